"""Dropout whose mask is a function of a seed and of its shape: computed again wherever it is needed, never kept.

On a CPU the mask comes from a generator with that seed, on CUDA from a counter-based one, Philox4x32-10 of (seed,
column, row). So the two draw different masks from one seed, and neither reads or moves torch's global random state.

Shapes: N tokens, D features.
Source: Srivastava et al. 2014, JMLR 15, section 10, scaled while training; Salmon et al. 2011, SC11 (Philox).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlbench_kernels.launch import use_triton


class LoraDropout(NamedTuple):
    """One mask of one linear layer's input.

    Example:
        LoraDropout(p=0.05, seed=17)
    """

    p: float  # probability that a number is dropped, in [0, 1)
    seed: int  # in [0, 2**63)


def seeded_dropout(x: Tensor, dropout: LoraDropout) -> Tensor:
    """x / (1 - p) where the mask keeps it, 0 elsewhere; the gradient takes the same mask, drawn again.

    Args:
        x: [..., D] of any floating dtype.

    Raises:
        ValueError: p or seed is out of range.
    """
    check_dropout(dropout, "dropout")
    return _SeededDropout.apply(x.reshape(-1, x.shape[-1]), dropout).view(x.shape)  # pyright: ignore[reportOptionalMemberAccess]


def check_dropout(dropout: LoraDropout, name: str) -> None:
    """
    Raises:
        ValueError: p or seed is out of range.
    """
    if not (0 <= dropout.p < 1 and 0 <= dropout.seed < 2**63):
        raise ValueError(f"{name}: p in [0, 1) and seed in [0, 2**63) expected, got {dropout.p} and {dropout.seed}")


def drop(rows: Tensor, dropout: LoraDropout | None, *, add_to: Tensor | None = None) -> Tensor:
    """As `seeded_dropout`, without gradient; None drops nothing.

    Args:
        rows: [N, D].
        add_to: [N, D] that the result is added to in place, and which is returned; None: a new tensor, or `rows`.
    """
    if dropout is None:
        return rows if add_to is None else add_to.add_(rows)
    if use_triton(rows.device) and rows.dtype != torch.float64 and rows.numel() > 0:
        from rlbench_kernels.lora_dropout_triton import launch_drop

        return launch_drop(rows, dropout.p, dropout.seed, add_to)
    kept = torch.where(keep_mask(rows.shape, dropout, rows.device), rows * (1 / (1 - dropout.p)), 0.0)
    return kept if add_to is None else add_to.add_(kept)


def keep_mask(shape: torch.Size, dropout: LoraDropout, device: torch.device) -> Tensor:
    """bool of `shape`, True where a number is kept: the reference's mask, p rounded to 1 / 65536.

    16 random bits a number: fewer draws than `bernoulli_`, which takes one a number.
    """
    generator = torch.Generator(device).manual_seed(dropout.seed)
    words = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[: shape.numel()].view(shape) >= round(dropout.p * 65536) - 32768


class _SeededDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, dropout: LoraDropout) -> Tensor:
        ctx.dropout = dropout
        return drop(rows, dropout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return drop(grad, ctx.dropout), None
