"""Corrections for tokens that another policy than the trainer's sampled: weights and masks on token losses.

The engine computes other logprobs than the trainer for the same weights, and later updates of a batch move the
policy further. rho_t = old policy / sampler on token t corrects the first; the ratio inside the loss the second.

Shapes: T loss positions of one microbatch (or chunk, for level=token), B its sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlbench.algorithms.loss_inputs import sum_by_sequence


def importance_weights(
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    loss_mask: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    method: str,
    level: str,
    low: float | None,
    high: float | None,
) -> tuple[Tensor, Tensor]:
    """Weights rho, truncated to [low, high] or set to 0 outside of it.

    method=truncate, level=token: TIS, on by default. method=mask, level=token: IcePop. method=mask with level=sequence
    or geometric: masked importance sampling of whole sequences, which removes the bias that truncation of tokens keeps.

    Args:
        old_logprobs: float32 [T], trainer before the batch's first update.
        sampling_logprobs: float32 [T], reported by the engine.
        loss_mask: bool [T].
        sequence_ids: int64 [T].
        num_sequences: B.
        method: truncate, or mask.
        level: token (rho_t), sequence (product over the sequence), geometric (its geometric mean).
        low: lower bound, or None.
        high: upper bound, or None.

    Returns:
        Weights float32 [T] without gradient, and bool [T], True where a bound was met.

    Source: TIS: Yao et al. 2025, https://fengyao.notion.site/off-policy-rl. IcePop: Ring-1T, arXiv:2510.18855.
    Sequence masks: Liu et al. 2025, "When Speed Kills Stability", as in TRL's `sequence_mask`.
    """
    log_rho = torch.where(loss_mask, (old_logprobs - sampling_logprobs).detach(), 0.0)  # [T]
    if level != "token":
        totals = sum_by_sequence(log_rho, sequence_ids, num_sequences)
        if level == "geometric":
            totals = totals / sum_by_sequence(loss_mask.to(log_rho.dtype), sequence_ids, num_sequences).clamp(min=1)
        log_rho = totals[sequence_ids]
    rho = log_rho.exp()
    is_outside = torch.zeros_like(loss_mask)
    if low is not None:
        is_outside = is_outside | (rho < low)
    if high is not None:
        is_outside = is_outside | (rho > high)
    if method == "mask":
        return torch.where(is_outside, 0.0, rho), is_outside
    is_bounded = low is not None or high is not None
    return rho.clamp(min=low, max=high) if is_bounded else rho, is_outside


def off_policy_mask(
    logprobs: Tensor,
    sampling_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    threshold: float,
) -> Tensor:
    """True where a token is kept: A >= 0, or mean_t log(sampler / policy) of its sequence at most `threshold`.

    Bad samples that the policy no longer makes teach nothing and can ruin it; good ones are always kept.

    Args:
        logprobs: float32 [T], current policy.
        sampling_logprobs: float32 [T].
        advantages: float32 [T].
        loss_mask: bool [T].
        sequence_ids: int64 [T].
        num_sequences: B.
        threshold: nats a token.

    Returns:
        bool [T].

    Source: DeepSeek-V3.2, arXiv:2512.02556, eq. 9.
    """
    gap = torch.where(loss_mask, sampling_logprobs - logprobs.detach(), 0.0)
    lengths = sum_by_sequence(loss_mask.to(gap.dtype), sequence_ids, num_sequences).clamp(min=1)
    mean_gap = (sum_by_sequence(gap, sequence_ids, num_sequences) / lengths)[sequence_ids]
    return (advantages >= 0) | (mean_gap <= threshold)
