"""Counter-based sampling seeds: a seed is a function of where a sample stands, not of what was drawn before."""

import hashlib


def sampling_seed(run_seed: int, step: int, prompt_id: str, sample_index: int) -> int:
    """First 63 bits of SHA-256 over (run_seed, step, prompt_id, sample_index).

    Resume, replay and another batch order therefore give every sample the same seed.

    Args:
        run_seed: the run's `seed`.
        step: optimizer step that the sample is made for, from 1; 0 for evaluation before training.
        prompt_id: stable id of the prompt.
        sample_index: place of the completion in its group, from 0.

    Returns:
        An integer in [0, 2**63).
    """
    key = f"{run_seed}\x1f{step}\x1f{prompt_id}\x1f{sample_index}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
