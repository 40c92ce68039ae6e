"""The critic's loss, and how much of the returns it explains.

Shapes: T loss positions of one microbatch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    loss_mask: Tensor,
    *,
    clip_value: float | None,
    num_loss_tokens: int,
) -> tuple[Tensor, Tensor]:
    """max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2, averaged over loss tokens.

    Args:
        values: float32 [T], with gradient.
        old_values: float32 [T], before the batch's first update.
        returns: float32 [T], the targets.
        loss_mask: bool [T].
        clip_value: c > 0; None does not clip.
        num_loss_tokens: over all microbatches of the update: the denominator.

    Returns:
        The loss [] and the share of loss tokens whose gradient the clip removed [].

    Source: OpenAI baselines, ppo2/model.py. No coefficient as there (`vf_coef`): the critic has parameters and an
    optimizer of its own.
    """
    error = (values - returns) ** 2
    is_clipped = torch.zeros_like(loss_mask)
    if clip_value is not None:
        clipped = old_values + (values - old_values).clamp(-clip_value, clip_value)
        clipped_error = (clipped - returns) ** 2
        is_clipped = (clipped_error > error) & loss_mask
        error = torch.maximum(error, clipped_error)
    loss = 0.5 * torch.where(loss_mask, error, 0.0).sum() / num_loss_tokens
    return loss, is_clipped.sum() / num_loss_tokens


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 is perfect, 0 no better than a constant; nan where all returns are equal.

    Args:
        values: float32 [T], loss tokens of the batch.
        returns: float32 [T].
    """
    spread = returns.double().var(correction=0)
    return float(1 - (returns.double() - values.double()).var(correction=0) / spread) if spread > 0 else float("nan")
