"""RMS normalisation, alone and with the residual addition before it.

Shapes: [..., D]; D features. All arithmetic in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlbench_kernels.launch import use_triton

_MAX_FEATURES = 32768  # a Triton program holds whole rows


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """y = n(x) (weight + offset), n(x) = x / sqrt(mean(x^2) + eps) over the last dimension.

    Rounded as transformers does it: with offset 0 (Llama, Qwen) n(x) is rounded to x's dtype, then multiplied by the
    weight; with another offset (Gemma: 1) the product is computed in float32 and rounded once. On CPU the result has
    transformers' bits. In Triton float32 sums in another order, so n(x) can be one rounding step of x's dtype away.

    Args:
        x: [..., D]; on CUDA any strides with adjacent features, such as heads in a fused [T, 3 H D], without a copy.
        weight: [D]. A frozen weight costs nothing in the backward pass.
        eps: >= 0, added to the mean square.
        offset: added to the weight.

    Returns:
        [..., D], contiguous; with offset 0 in the dtype to which x and weight promote, else in x's.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(x, weight, eps)
    return _RmsNorm.apply(x, weight, float(eps), float(offset))  # type: ignore


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """new_residual = x + residual, rounded to their dtype, and rms_norm(new_residual), in one pass.

    Args:
        x, residual: [..., D], one shape and dtype; neither is overwritten.
        weight, eps, offset: as in `rms_norm`.

    Returns:
        The normed [..., D], as `rms_norm`, and new_residual [..., D].

    Raises:
        ValueError: as `rms_norm`; x and residual that differ in shape or dtype.
    """
    _check(x, weight, eps)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual: {x.dtype} {[*x.shape]} expected, as x has, got {residual.dtype} {[*residual.shape]}"
        )
    return _AddRmsNorm.apply(x, residual, weight, float(eps), float(offset))  # type: ignore


def forked_rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """rms_norm(x), and x for the residual stream: the backward pass adds their gradients in float32, in one pass.

    Args:
        x, weight, eps, offset: as in `rms_norm`.

    Returns:
        The normed [..., D], as `rms_norm`, and a view of x.

    Raises:
        ValueError: as `rms_norm`.
    """
    _check(x, weight, eps)
    return _ForkedRmsNorm.apply(x, weight, float(eps), float(offset))  # type: ignore


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.constants = (eps, offset)
        return _norm(x, weight, eps, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return *_gradients(x, weight, grad, None, ctx.constants, ctx.needs_input_grad[1]), None, None


class _ForkedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.constants = (eps, offset)
        ctx.set_materialize_grads(False)
        return _norm(x, weight, eps, offset), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_residual: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if grad is None:
            return grad_residual, None, None, None
        return *_gradients(x, weight, grad, grad_residual, ctx.constants, ctx.needs_input_grad[1]), None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        ctx.constants = (eps, offset)
        ctx.set_materialize_grads(False)
        if _has_kernel(x):
            from rlbench_kernels.norms_triton import launch_norm

            normed, new_residual = launch_norm(x, residual, weight, eps, offset)
            assert new_residual is not None
        else:
            new_residual = x + residual
            normed = _reference(new_residual, weight, eps, offset)
        ctx.save_for_backward(new_residual, weight)
        return normed, new_residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_residual: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        if grad is None:
            return grad_residual, grad_residual, None, None, None
        grad_x, grad_weight = _gradients(hidden, weight, grad, grad_residual, ctx.constants, ctx.needs_input_grad[2])
        return grad_x, grad_x, grad_weight, None, None


def _norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    if _has_kernel(x):
        from rlbench_kernels.norms_triton import launch_norm

        return launch_norm(x, None, weight, eps, offset)[0]
    return _reference(x, weight, eps, offset)


def _gradients(
    x: Tensor, weight: Tensor, grad: Tensor, grad_residual: Tensor | None, constants: tuple[float, float],
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """d x, with `grad_residual` added, and d weight where it is needed."""
    if _has_kernel(x):
        from rlbench_kernels.norms_triton import launch_norm_gradients

        return launch_norm_gradients(x, weight, grad, grad_residual, *constants, needs_weight)
    return _reference_gradients(x, weight, grad, grad_residual, *constants, needs_weight)


def _reference(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    normed, _ = _normalise(x, eps)
    if offset == 0.0:
        return weight * normed.to(x.dtype)
    return (normed * (offset + weight.to(normed.dtype))).to(x.dtype)


def _reference_gradients(
    x: Tensor, weight: Tensor, grad: Tensor, grad_residual: Tensor | None, eps: float, offset: float,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """d x = (g - n mean(g n)) / rms with g = dy (weight + offset); d weight = sum over rows of dy n."""
    normed, inverse = _normalise(x, eps)
    grad = grad.to(normed.dtype)
    grad_weight = None
    if needs_weight:
        grad_weight = (grad * normed).reshape(-1, len(weight)).sum(0).to(weight.dtype)
    scaled = grad * (weight.to(normed.dtype) + offset)
    grad_x = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * inverse
    if grad_residual is not None:
        grad_x += grad_residual
    return grad_x.to(x.dtype), grad_weight


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """n(x) and 1 / rms [..., 1], unrounded."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide * inverse, inverse


def _has_kernel(x: Tensor) -> bool:
    return use_triton(x.device) and x.dtype != torch.float64 and x.numel() > 0 and x.shape[-1] <= _MAX_FEATURES


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"x [..., D] and weight [D] expected, got {[*x.shape]} and {[*weight.shape]}")
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"x and weight need floating dtypes, got {x.dtype} and {weight.dtype}")
    if eps < 0:
        raise ValueError(f"eps must not be below 0, got {eps}")
