"""`lora_gating` on CUDA: one kernel a direction. Rows may be strided.

Shapes: N tokens, I intermediate features.
"""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlbench_kernels.gated_activation_triton import activate
from rlbench_kernels.launch import cdiv

_BLOCK = 1024


@triton.jit
def _gate(both, out, size, stride, out_stride, BLOCK: tl.constexpr, IS_SILU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(both + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(both + row * stride + size + column, mask=mask, other=0.0).to(tl.float32)
    value, _ = activate(gate, IS_SILU)
    tl.store(out + row * out_stride + column, (value * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gate_gradients(
    both, grad, out, size, stride, grad_stride, out_stride, BLOCK: tl.constexpr, IS_SILU: tl.constexpr
):  # fmt: skip
    """out, which may be both, = (d gate, d up); grad, read as d h, becomes h."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(both + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(both + row * stride + size + column, mask=mask, other=0.0).to(tl.float32)
    grad_hidden = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    value, slope = activate(gate, IS_SILU)
    target = out + row * out_stride + column
    tl.store(target, (grad_hidden * up * slope).to(out.dtype.element_ty), mask=mask)
    tl.store(target + size, (grad_hidden * value).to(out.dtype.element_ty), mask=mask)
    tl.store(grad + row * grad_stride + column, (value * up).to(grad.dtype.element_ty), mask=mask)


def launch_gate(both: Tensor, activation: str, out: Tensor) -> None:
    """out [N, I] = act(gate) * up."""
    num_rows, size = out.shape
    with torch.cuda.device_of(out):
        _gate[(num_rows, cdiv(size, _BLOCK))](
            both, out, size, both.stride(0), out.stride(0), BLOCK=_BLOCK, IS_SILU=activation == "silu"
        )


def launch_gate_gradients(both: Tensor, grad: Tensor, activation: str, out: Tensor) -> None:
    """Write d gate and d up to out [N, 2 I], and h over grad [N, I]."""
    num_rows, size = grad.shape
    with torch.cuda.device_of(out):
        _gate_gradients[(num_rows, cdiv(size, _BLOCK))](
            both, grad, out, size, both.stride(0), grad.stride(0), out.stride(0), BLOCK=_BLOCK,
            IS_SILU=activation == "silu",
        )  # fmt: skip
