"""Random ragged batches, packed for our losses and padded for others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlbench.algorithms.loss_inputs import LossInputs
from rlbench.algorithms.reduce import BatchTotals, token_weights

MAX_TOKENS = 9


@dataclass(frozen=True)
class Batch:
    """Padded tensors [B, L] and advantages [B]; sequences are left-aligned, masked tokens may lie inside."""

    logprobs: Tensor
    old_logprobs: Tensor
    sampling_logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    mask: Tensor  # bool, loss tokens
    present: Tensor  # bool, tokens of the sequence
    advantages: Tensor

    def rows(self, index: list[int]) -> Batch:
        return Batch(**{name: getattr(self, name)[index] for name in self.__dataclass_fields__})

    def packed(self, values: Tensor) -> Tensor:
        return values[self.present]


def make_batch(seed: int, *, num_sequences: int = 6, spread: float = 0.3, with_holes: bool = False) -> Batch:
    """Log ratios of standard deviation `spread` between the policies."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_sequences, MAX_TOKENS)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    lengths = torch.randint(1, MAX_TOKENS + 1, (num_sequences,), generator=generator)
    present = torch.arange(MAX_TOKENS) < lengths[:, None]
    mask = present & (torch.rand(shape, generator=generator) < 0.8) if with_holes else present
    old = -torch.rand(shape, generator=generator) * 3 - 0.1
    return Batch(
        logprobs=(old + normal(spread)).requires_grad_(),
        old_logprobs=old,
        sampling_logprobs=old + normal(spread),
        ref_logprobs=old + normal(spread),
        entropy=torch.rand(shape, generator=generator) * 3,
        mask=mask,
        present=present,
        advantages=torch.randn(num_sequences, generator=generator),
    )


def totals_of(batch: Batch) -> BatchTotals:
    return BatchTotals(
        num_loss_tokens=int(batch.mask.sum()), num_sequences=len(batch.mask), max_completion_tokens=MAX_TOKENS
    )


def loss_inputs(batch: Batch, normalization: str, totals: BatchTotals | None = None, **changes) -> LossInputs:
    """The packed form. Gradients flow to `batch.logprobs`."""
    totals = totals or totals_of(batch)
    ids = torch.arange(len(batch.mask))[:, None].expand_as(batch.mask)[batch.present]
    mask = batch.packed(batch.mask)
    inputs = LossInputs(
        logprobs=batch.packed(batch.logprobs),
        old_logprobs=batch.packed(batch.old_logprobs),
        sampling_logprobs=batch.packed(batch.sampling_logprobs),
        advantages=batch.packed(batch.advantages[:, None].expand_as(batch.mask)),
        loss_mask=mask,
        weights=token_weights(mask, ids, normalization, totals, num_sequences=len(batch.mask), num_microbatches=1),
        sequence_ids=ids,
        num_sequences=len(batch.mask),
        num_loss_tokens=totals.num_loss_tokens,
        is_selected=torch.zeros_like(mask),
    )
    return replace(inputs, **changes)


def gradient(loss: Tensor, batch: Batch) -> Tensor:
    """d loss / d logprobs: [B, L]."""
    (grad,) = torch.autograd.grad(loss, batch.logprobs)
    return grad
