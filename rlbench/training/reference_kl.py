"""KL to the reference policy of every sampled token, for a penalty in the reward.

Shapes: N loss positions of one microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlbench.algorithms import KL_ESTIMATORS
from rlbench.data.packing import pack
from rlbench.models.policy import Policy
from rlbench.records import Rollout, RolloutGroup, TrainingSample
from rlbench.training.step import policy_logprobs, reference_logprobs


def reference_kl(
    policy: Policy,
    groups: Sequence[RolloutGroup],
    *,
    estimator: str,
    temperature: float,
    tokens_per_microbatch: int,
    reference: Policy | None = None,
) -> dict[str, list[float]]:
    """Value of the estimator at each token, in nats, by rollout_id, for rollouts that have a reward and tokens.

    Args:
        policy: with the adapter that sampled.
        groups: of one step.
        estimator: a key of KL_ESTIMATORS.
        temperature: of sampling.
        tokens_per_microbatch: packed tokens of one forward.
        reference: as in `reference_logprobs`.

    Raises:
        ValueError: a rollout exceeds `tokens_per_microbatch`.
    """
    samples = {r.rollout_id: unscored_sample(r) for group in groups for r in group.rollouts if r.is_comparable}
    by_sample: dict[TrainingSample, list[float]] = {}  # equal samples have equal values
    for microbatch in pack(list(samples.values()), tokens_per_microbatch=tokens_per_microbatch, device=policy.device):
        logprobs, _ = policy_logprobs(policy, microbatch, temperature)  # [N]
        ref_logprobs = reference_logprobs(policy, microbatch, temperature, reference)  # [N]
        kl = KL_ESTIMATORS[estimator](logprobs, ref_logprobs, logprobs)  # [N]
        lengths = torch.bincount(microbatch.sequence_ids).tolist()
        for sample, values in zip(microbatch.samples, kl.split(lengths), strict=True):
            by_sample[sample] = values.tolist()
    return {rollout_id: by_sample[sample] for rollout_id, sample in samples.items()}


@torch.no_grad()
def refresh_reference(reference: Policy, policy: Policy, frac: float) -> None:
    """reference += frac (policy - reference), A and B of the adapters apart; frac=1 is an exact copy.

    Source: TR-DPO, arXiv:2404.09656 (hard and soft updates).
    """
    for (name, theirs), (own_name, own) in zip(policy.named_parameters(), reference.named_parameters(), strict=True):
        assert name == own_name
        own.lerp_(theirs, frac) if frac < 1 else own.copy_(theirs)


def unscored_sample(rollout: Rollout) -> TrainingSample:
    """A rollout without credit, for forwards that only read its tokens."""
    length = len(rollout.completion.token_ids)
    return TrainingSample(
        group_id=rollout.prompt.prompt_id,
        prompt_token_ids=rollout.prompt.token_ids,
        token_ids=rollout.completion.token_ids,
        sampling_logprobs=rollout.completion.sampling_logprobs,
        advantages=(0.0,) * length,
        loss_mask=(True,) * length,
    )
