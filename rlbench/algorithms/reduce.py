"""Normalizations: how the losses of single tokens become the loss of a step, as one weight a token.

Shapes: T loss positions of one microbatch, B its sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlbench.algorithms.loss_inputs import sum_by_sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTotals:
    """Counts of one update, over all of its samples: those without advantage too, even if no forward is made of them.

    Example:
        BatchTotals(num_loss_tokens=4096, num_sequences=32, max_completion_tokens=256)
    """

    num_loss_tokens: int
    num_sequences: int
    max_completion_tokens: int  # sampling.max_tokens


def token_weights(
    loss_mask: Tensor,
    sequence_ids: Tensor,
    normalization: str,
    totals: BatchTotals,
    *,
    num_sequences: int,
    num_microbatches: int,
) -> Tensor:
    """Weight of each token in the step's loss, which is sum_t weight_t loss_t over all microbatches.

    Args:
        loss_mask: bool [T].
        sequence_ids: int64 [T], from 0 to num_sequences - 1.
        normalization: a key of NORMALIZATIONS.
        totals: of the update.
        num_sequences: of this microbatch.
        num_microbatches: of the update.

    Returns:
        float32 [T], 0 where masked.
    """
    num_tokens = sum_by_sequence(loss_mask.float(), sequence_ids, num_sequences)[sequence_ids].clamp(min=1)  # [T]
    weights = NORMALIZATIONS[normalization](loss_mask, num_tokens, totals, num_microbatches)
    return torch.where(loss_mask, weights, 0.0)


def _token_mean(loss_mask: Tensor, num_tokens: Tensor, totals: BatchTotals, num_microbatches: int) -> Tensor:
    """1 / (loss tokens of the step): every token counts the same.

    DAPO's equation divides by the tokens of one prompt's group and averages over prompts, its code by those of all
    prompts together; this is the code's, in which no token counts more because its group is short.

    Source: DAPO, arXiv:2503.14476, section 3.3.
    """
    return torch.full_like(num_tokens, 1 / max(1, totals.num_loss_tokens))


def _sequence_mean(loss_mask: Tensor, num_tokens: Tensor, totals: BatchTotals, num_microbatches: int) -> Tensor:
    """1 / (sequences x tokens of the sequence): all sequences count the same. Source: GRPO, arXiv:2402.03300, eq. 3."""
    return 1 / (totals.num_sequences * num_tokens)


def _sequence_sum(loss_mask: Tensor, num_tokens: Tensor, totals: BatchTotals, num_microbatches: int) -> Tensor:
    """1 / sequences: a sequence counts by its length. Source: LUSPO, arXiv:2602.05261 (with a sequence ratio)."""
    return torch.full_like(num_tokens, 1 / totals.num_sequences)


def _constant(loss_mask: Tensor, num_tokens: Tensor, totals: BatchTotals, num_microbatches: int) -> Tensor:
    """1 / (sequences x token limit): no dependence on lengths. Source: Dr.GRPO, arXiv:2503.20783, section 3.2."""
    return torch.full_like(num_tokens, 1 / (totals.num_sequences * totals.max_completion_tokens))


def _microbatch_token_mean(loss_mask: Tensor, num_tokens: Tensor, totals: BatchTotals, num_microbatches: int) -> Tensor:
    """1 / (microbatches x loss tokens of this one): TRL's `bnpo`. The only one that depends on the split."""
    return torch.full_like(num_tokens, 1.0) / (num_microbatches * loss_mask.sum().clamp(min=1))


NORMALIZATIONS: dict[str, Callable[[Tensor, Tensor, BatchTotals, int], Tensor]] = {
    "token_mean": _token_mean,
    "sequence_mean": _sequence_mean,
    "sequence_sum": _sequence_sum,
    "constant": _constant,
    "microbatch_token_mean": _microbatch_token_mean,
}
