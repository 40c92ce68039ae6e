"""Tokens chosen over a whole batch before its first update: those of highest entropy, those a loss singles out.

Shapes: N loss positions of one microbatch, T loss tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlbench.algorithms import SELECTIONS
from rlbench.algorithms.selection import covariances, top_entropy_threshold
from rlbench.config.algorithm import AlgorithmConfig
from rlbench.data.packing import Microbatch


def choose_tokens(
    microbatches: Sequence[Microbatch],
    columns: Sequence[dict[str, Tensor]],
    entropies: Sequence[Tensor],
    config: AlgorithmConfig,
    *,
    seed: int,
) -> None:
    """Add the columns `is_top_entropy` and `is_selected`, bool [N] each, where the config asks for them.

    Args:
        microbatches: of the whole batch.
        columns: for each microbatch, with `old_logprobs`; added to in place.
        entropies: for each microbatch [N], before the first update.
        config: the `algorithm` part of the config.
        seed: of the random choice.
    """
    masks = [microbatch.loss_mask for microbatch in microbatches]
    if config.top_entropy_frac < 1:
        threshold = top_entropy_threshold(_over_batch(entropies, masks), config.top_entropy_frac)
        for part, entropy, mask in zip(columns, entropies, masks, strict=True):
            part["is_top_entropy"] = (entropy >= threshold) & mask
    if config.loss_spec.needs_selection:
        covariance = covariances(
            _over_batch([part["old_logprobs"] for part in columns], masks),
            _over_batch([microbatch.advantages for microbatch in microbatches], masks),
        )
        generator = torch.Generator().manual_seed(seed)
        chosen = SELECTIONS[config.loss](covariance, generator, **config.loss_options())
        for part, mask, own in zip(columns, masks, chosen.split([int(mask.sum()) for mask in masks]), strict=True):
            part["is_selected"] = torch.zeros_like(mask).masked_scatter(mask, own)


def _over_batch(values: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Values of the loss tokens of all microbatches: [T]."""
    return torch.cat([value[mask] for value, mask in zip(values, masks, strict=True)])
