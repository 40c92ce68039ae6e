"""The trainer's logprobs of given tokens, computed as a training step computes them, without gradient.

Shapes: N completion tokens, one sequence after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from rlbench.data.packing import Microbatch, pack
from rlbench.models.policy import Policy
from rlbench.records import SamplingParams, TrainingSample
from rlbench_kernels import linear_logprobs, support_thresholds


def pack_sequences(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device
) -> Microbatch:
    """One microbatch whose targets are the completions' tokens in the given order."""
    samples = [
        TrainingSample(
            group_id=str(index),
            prompt_token_ids=tuple(prompt),
            token_ids=tuple(completion),
            sampling_logprobs=(0.0,) * len(completion),
            advantages=(0.0,) * len(completion),
            loss_mask=(True,) * len(completion),
        )
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
    num_tokens = sum(len(s.prompt_token_ids) + len(s.token_ids) for s in samples)
    (microbatch,) = pack(samples, tokens_per_microbatch=num_tokens, device=device)
    return microbatch


@torch.no_grad()
def trainer_logprobs(
    policy: Policy, microbatch: Microbatch, *, use_adapter: bool = True, temperatures: Sequence[float] = (1.0,)
) -> list[Tensor]:
    """float32 [N] for each temperature: log_softmax(logits / temperature) at the targets."""
    with nullcontext() if use_adapter else policy.reference():
        hidden, weight = policy.hidden(microbatch), policy.head_weight
    targets, softcap = microbatch.targets, policy.softcap
    return [linear_logprobs(hidden, weight, targets, temperature=t, softcap=softcap)[0] for t in temperatures]


@torch.no_grad()
def truncated_logprobs(policy: Policy, microbatch: Microbatch, sampling: SamplingParams) -> Tensor:
    """float32 [N]: log_softmax over the tokens that top_p, top_k and min_p leave of the policy's softmax.

    The counterpart of an engine's `sampling_logprobs` where sampling is only truncated. A target that the policy's own
    truncation leaves out counts as inside.
    """
    hidden, weight = policy.hidden(microbatch), policy.head_weight
    options = {"temperature": sampling.temperature, "softcap": policy.softcap}
    support = support_thresholds(
        hidden, weight, **options, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p
    )
    return linear_logprobs(hidden, weight, microbatch.targets, **options, support=support)[0]
