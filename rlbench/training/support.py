"""The softmax that truncated sampling draws from, on the trainer's side: the tokens that top_p, top_k and min_p leave.

The set is that of the policy before the batch's first update, so that ratios compare probabilities among the same
tokens. One number a token is kept of it: the logprob, in the full softmax, below which tokens are outside. No common
shift of the logits moves it; a token that an update carries across it does leave or enter. The drawn one is always
inside.

Shapes: N loss positions of one microbatch, D hidden, V vocabulary.
Source: "Keep Sampling Mask", DeepSeek-V3.2, arXiv:2512.02556, where the set itself is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlbench.config.algorithm import AlgorithmConfig
from rlbench.data.packing import Microbatch
from rlbench.records import SamplingParams
from rlbench_kernels import linear_logprobs, support_thresholds
from rlbench_kernels.masked_attention import cap_scores


def support_sampler(sampling: SamplingParams, config: AlgorithmConfig) -> SamplingParams | None:
    """How completions are drawn, where an update's logprobs are restricted to what could be drawn; else None."""
    return sampling if config.support == "sampler" and sampling.is_only_truncated else None


@torch.no_grad()
def sampler_support(
    hidden: Tensor, weight: Tensor, targets: Tensor, sampler: SamplingParams, floor: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """`support` of `linear_logprobs`: scores below which the sampler could not have drawn a token.

    Args:
        hidden: [N, D], of the policy whose logprobs are taken.
        weight: [V, D].
        targets: int64 [N].
        sampler: its temperature, top_p, top_k and min_p are read.
        floor: of the policy that keeps its set, from `support_floor`; None: the policy's own set.
        softcap: of the logits, or None.

    Returns:
        float32 [N] (float64 for float64 inputs); -inf where every token is inside.
    """
    if floor is not None:
        return floor + _log_totals(hidden, weight, targets, sampler.temperature, softcap)
    return support_thresholds(
        hidden,
        weight,
        temperature=sampler.temperature,
        softcap=softcap,
        top_p=sampler.top_p,
        top_k=sampler.top_k,
        min_p=sampler.min_p,
    )


@torch.no_grad()
def support_floor(
    hidden: Tensor, weight: Tensor, targets: Tensor, sampler: SamplingParams, softcap: float | None = None
) -> Tensor:
    """[N]: threshold[i] - log sum_v exp(s[i, v]), s = logits / temperature: the logprob below which tokens are outside.

    Arguments as in `sampler_support`.
    """
    thresholds = sampler_support(hidden, weight, targets, sampler, None, softcap)
    return thresholds - _log_totals(hidden, weight, targets, sampler.temperature, softcap)


def outside_mass(microbatches: Sequence[Microbatch]) -> float:
    """Mean over loss tokens of the probability that truncation took away, by the engine's logprobs.

    1 - exp(plain - sampling logprob): as `Completion` says, where only truncation is on.
    """
    outside = [
        -torch.expm1((microbatch.engine_logprobs - microbatch.sampling_logprobs).clamp(max=0))[microbatch.loss_mask]
        for microbatch in microbatches
    ]
    return float(torch.cat(outside).mean())


def _log_totals(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float | None
) -> Tensor:  # fmt: skip
    """log sum_v exp(s[i, v]): [N]."""
    logprobs, _ = linear_logprobs(hidden, weight, targets, temperature=temperature, softcap=softcap)
    logits = (hidden.to(logprobs.dtype) * weight[targets].to(logprobs.dtype)).sum(-1)
    return cap_scores(logits, softcap) / temperature - logprobs
