"""Repetition, presence and frequency penalties: token counts of a wave and the logits that they change.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlbench.records import SamplingParams


class Penalties:
    """Which tokens each row has seen. The formula stands in `rlbench.records.SamplingParams`."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, vocab_size: int, device: torch.device
    ) -> None:
        """
        Args:
            prompts: one a row; the repetition penalty reads them.
            sampling: with the three penalties.
            vocab_size: V.
            device: of the logits.
        """
        self._sampling = sampling
        self._counts = torch.zeros(len(prompts), vocab_size, dtype=torch.int32, device=device)
        self._is_seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            self._is_seen[row, torch.tensor(list(prompt), device=device)] = True

    def apply(self, logits: Tensor) -> Tensor:
        """[B, V] -> float32 [B, V]."""
        scores, sampling = logits.float(), self._sampling
        if sampling.repetition_penalty != 1:
            factor = sampling.repetition_penalty
            scores = torch.where(self._is_seen, torch.where(scores > 0, scores / factor, scores * factor), scores)
        scores = scores - sampling.frequency_penalty * self._counts
        return scores - sampling.presence_penalty * (self._counts > 0)

    def count(self, tokens: Tensor) -> None:
        """Note the token drawn in each row; int64 [B]."""
        rows = torch.arange(len(tokens), device=tokens.device)
        self._counts[rows, tokens] += 1
        self._is_seen[rows, tokens] = True

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but `rows` (int64, ascending)."""
        self._counts, self._is_seen = self._counts[rows], self._is_seen[rows]
