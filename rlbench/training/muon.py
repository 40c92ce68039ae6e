"""Muon for matrices, AdamW for all else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from rlbench.models.moments import is_matrix


class MuonAdamW(torch.optim.Optimizer):
    """torch's own Muon over the matrices and AdamW over the rest; state and learning rate as of one optimizer.

    Muon's update is that of AdamW in size (0.2 sqrt(max(rows, columns)) times the orthogonal matrix), so one learning
    rate holds for both.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the size of the update, Liu et al. 2025,
    arXiv:2502.16982, section 2.2.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        momentum: float,
        others: Collection[nn.Parameter] = (),
        **adamw: Any,
    ) -> None:
        """
        Args:
            parameters: all that are trained.
            momentum: of the matrices.
            others: matrices that AdamW updates: embeddings and the head. So do rows and columns, e.g. a value head.
            adamw: lr, betas, eps and weight_decay; lr and weight_decay hold for the matrices too.
        """
        left_out = {id(parameter) for parameter in others}
        matrices = [p for p in parameters if is_matrix(p.shape) and id(p) not in left_out]
        chosen = {id(parameter) for parameter in matrices}
        rest = [p for p in parameters if id(p) not in chosen]
        super().__init__(list(parameters), adamw)
        shared = {key: adamw[key] for key in ("lr", "weight_decay")}
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(torch.optim.Muon(matrices, **shared, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self._parts.append(torch.optim.AdamW(rest, **adamw, fused=rest[0].is_cuda))
        for part in self._parts:
            part.state = self.state
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of both."""
        assert closure is None
        for part in self._parts:
            part.step()
        return None
