"""Rotary position embedding of queries and keys together.

Shapes: T packed tokens, Hq query heads, Hk key heads, hd features of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlbench_kernels.launch import use_triton


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the halves of each head of q and k.

    The half-rotation of transformers' Llama and Qwen; the gradient is the inverse rotation. Positions, packed or not,
    come in through cos and sin. On CPU the result has transformers' bits; in Triton it is float32, rounded once.

    Args:
        q: [T, Hq, hd], any strides with adjacent features.
        k: [T, Hk, hd], likewise.
        cos, sin: [T, hd], both halves equal, as transformers' rotary embeddings make them: Triton reads the first
            half. Of any floating dtype; they get no gradient.

    Returns:
        New q and k, contiguous, in their own dtypes.

    Raises:
        ValueError: shapes or dtypes that do not fit; cos or sin that require gradient.

    Source: Su et al. 2021, arXiv 2104.09864, section 3.2.2; its pairs (2i, 2i + 1) are (i, i + hd / 2) here.
    """
    _check(q, k, cos, sin)
    return _Rope.apply(q, k, cos, sin)  # type: ignore


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin, is_inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        return *_rotate(grad_q, grad_k, *ctx.saved_tensors, is_inverse=True), None, None


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_inverse: bool) -> tuple[Tensor, Tensor]:
    if use_triton(q.device) and torch.float64 not in (q.dtype, k.dtype) and q.numel() and k.numel():
        from rlbench_kernels.rope_triton import launch_rotation

        return launch_rotation(q, k, cos, sin, is_inverse=is_inverse)
    sin = -sin if is_inverse else sin
    return _reference(q, cos, sin), _reference(k, cos, sin)


def _reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, hd]
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.ndim != 3 or k.ndim != 3 or q.shape[::2] != k.shape[::2]:
        raise ValueError(f"q [T, Hq, hd] and k [T, Hk, hd] expected, got {[*q.shape]} and {[*k.shape]}")
    if q.shape[2] % 2:
        raise ValueError(f"heads need an even number of features, got {q.shape[2]}")
    if cos.shape != q.shape[::2] or sin.shape != cos.shape:
        raise ValueError(f"cos and sin: [{len(q)}, {q.shape[2]}] expected, got {[*cos.shape]} and {[*sin.shape]}")
    if not all(tensor.is_floating_point() for tensor in (q, k, cos, sin)):
        raise ValueError(f"floating dtypes expected, got {q.dtype}, {k.dtype}, {cos.dtype} and {sin.dtype}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin get no gradient: detach them")
