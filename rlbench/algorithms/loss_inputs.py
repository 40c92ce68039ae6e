"""What a policy loss reads and returns, and the sums that all of them use.

Shapes: T loss positions of one microbatch, or of one chunk of it for losses that need no sequences; B its sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Everything a policy loss may read about one microbatch. All tensors [T].

    `weights` is each token's weight in the step's loss: the normalization (`rlbench.algorithms.reduce`) times the
    off-policy correction (`rlbench.algorithms.importance`). Losses never average on their own.
    """

    logprobs: Tensor  # float32, current policy, carries gradient
    old_logprobs: Tensor  # float32, policy before this batch's first update
    sampling_logprobs: Tensor  # float32, reported by the engine that sampled
    advantages: Tensor  # float32
    loss_mask: Tensor  # bool, True on trained tokens
    weights: Tensor  # float32, 0 on masked tokens
    sequence_ids: Tensor  # int64, the completion that each token belongs to
    num_sequences: int  # B
    num_loss_tokens: int  # over ALL microbatches of the step: the denominator of metrics
    is_selected: Tensor | None = None  # bool, the tokens singled out by a loss that asks for it


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    loss: Tensor  # [], sums to the step's loss over microbatches
    metrics: dict[str, Tensor]  # [], each a SUM over loss tokens divided by their number


def masked_log_ratio(inputs: LossInputs) -> Tensor:
    """log(policy / old policy), 0 where masked: [T]. Masked before any `exp`, so that -inf there gives no nan."""
    return torch.where(inputs.loss_mask, inputs.logprobs - inputs.old_logprobs, 0.0)


def masked_logprobs(inputs: LossInputs) -> Tensor:
    """Logprobs, 0 where masked: [T]."""
    return torch.where(inputs.loss_mask, inputs.logprobs, 0.0)


def weighted_sum(per_token: Tensor, inputs: LossInputs) -> Tensor:
    """sum_t weights_t per_token_t over loss tokens: []."""
    return (torch.where(inputs.loss_mask, per_token, 0.0) * inputs.weights).sum()


def token_frac(condition: Tensor, inputs: LossInputs) -> Tensor:
    """The microbatch's part of the share of loss tokens that fulfil `condition` (bool [T]): []."""
    return (condition & inputs.loss_mask).sum() / inputs.num_loss_tokens


def sum_by_sequence(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Sums of values [T] over each sequence: [B]."""
    return values.new_zeros(num_sequences).index_add(0, sequence_ids, values)


def mean_by_sequence(values: Tensor, inputs: LossInputs) -> Tensor:
    """Means of values [T] (0 where masked) over the loss tokens of each sequence, at every token: [T]."""
    totals = sum_by_sequence(values, inputs.sequence_ids, inputs.num_sequences)
    lengths = sum_by_sequence(inputs.loss_mask.to(values.dtype), inputs.sequence_ids, inputs.num_sequences)
    return (totals / lengths.clamp(min=1))[inputs.sequence_ids]


def check_same_shape(inputs: LossInputs) -> None:
    """
    Raises:
        ValueError: a tensor of `inputs` has another shape than `logprobs`.
    """
    expected = inputs.logprobs.shape
    for name in ("old_logprobs", "sampling_logprobs", "advantages", "loss_mask", "weights", "sequence_ids"):
        actual = getattr(inputs, name).shape
        if actual != expected:
            raise ValueError(f"{name} has shape {tuple(actual)}, expected {tuple(expected)} to match logprobs")
