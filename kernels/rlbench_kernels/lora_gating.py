"""The gated activation inside `lora_mlp`: h = act(gate) * up, and its gradients.

In PyTorch act(gate) is rounded to the dtype before the product; in Triton all is float32, rounded once.

Shapes: N tokens, I intermediate features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlbench_kernels.launch import use_triton

_aten = torch.ops.aten
# act(z), and (dh up, gate, out) -> d gate
GATES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], object]]] = {
    "silu": (F.silu, lambda grad, z, out: _aten.silu_backward.grad_input(grad, z, grad_input=out)),
    "gelu_tanh": (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda grad, z, out: _aten.gelu_backward.grad_input(grad, z, approximate="tanh", grad_input=out),
    ),
}


def apply_gate(both: Tensor, activation: str, out: Tensor) -> Tensor:
    """h [N, I] = act(gate) * up, written to `out`; both [N, 2 I] holds gate and up side by side."""
    if _has_kernel(both):
        from rlbench_kernels.lora_gating_triton import launch_gate

        launch_gate(both, activation, out)
        return out
    gate, up = both.chunk(2, 1)
    return torch.mul(GATES[activation][0](gate), up, out=out)


def gate_gradients(both: Tensor, grad: Tensor, activation: str, out: Tensor) -> Tensor:
    """Write d gate and d up to out [N, 2 I], which may be `both`; returns h [N, I], computed again.

    `grad`, d h, may be overwritten.
    """
    if _has_kernel(both):
        from rlbench_kernels.lora_gating_triton import launch_gate_gradients

        launch_gate_gradients(both, grad, activation, out)
        return grad
    gate, up = both.chunk(2, 1)
    grad_gate, grad_up = out.chunk(2, 1)
    function, derivative = GATES[activation]
    active = function(gate)
    hidden, scaled = active * up, grad * up
    torch.mul(grad, active, out=grad_up)
    derivative(scaled, gate, grad_gate)
    return hidden


def _has_kernel(both: Tensor) -> bool:
    return use_triton(both.device) and both.dtype != torch.float64 and both.numel() > 0
