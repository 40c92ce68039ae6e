"""Gated activations: act(gate) * up.

Shapes: [..., I]; I intermediate features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlbench_kernels.launch import use_triton

_aten = torch.ops.aten
# act(z), and (grad, z) -> grad act'(z)
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, _aten.silu_backward.default),
    "gelu_tanh": (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda grad, z: _aten.gelu_backward.default(grad, z, approximate="tanh"),
    ),
}


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, silu(z) = z sigmoid(z) (Llama, Qwen).

    The backward pass computes the activation again; only gate and up are kept. On CPU the activation is rounded to
    the dtype before the product, as in transformers; in Triton all is float32, rounded once.

    Args:
        gate, up: [..., I], one shape and dtype. Strided rows, such as both halves of a fused [T, 2 I], are read in
            place on CUDA.

    Returns:
        [..., I], contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    return _gated(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, gelu(z) = z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2 (Gemma); else as `swiglu`."""
    return _gated(gate, up, "gelu_tanh")


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if gate.ndim == 0 or gate.shape != up.shape:
        raise ValueError(f"gate and up need one shape [..., I], got {[*gate.shape]} and {[*up.shape]}")
    if gate.dtype != up.dtype or not gate.is_floating_point():
        raise ValueError(f"gate and up need one floating dtype, got {gate.dtype} and {up.dtype}")
    return _GatedActivation.apply(gate, up, activation)  # type: ignore


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        if _has_kernel(gate):
            from rlbench_kernels.gated_activation_triton import launch_activation

            return launch_activation(gate, up, activation)
        return (_ACTIVATIONS[activation][0](gate) * up).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        if _has_kernel(gate):
            from rlbench_kernels.gated_activation_triton import launch_activation_gradients

            return *launch_activation_gradients(gate, up, grad, ctx.activation), None
        function, derivative = _ACTIVATIONS[ctx.activation]
        return derivative(grad * up, gate), grad * function(gate), None


def _has_kernel(gate: Tensor) -> bool:
    return use_triton(gate.device) and gate.dtype != torch.float64 and gate.numel() > 0
