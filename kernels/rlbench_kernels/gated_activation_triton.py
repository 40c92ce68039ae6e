"""`gated_activation` on CUDA: one kernel a direction. Rows may be strided.

Shapes: rows of I features.
"""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlbench_kernels.launch import cdiv

_BLOCK = 1024  # with 4 warps: one 16-byte load a thread and operand
_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _place(size, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Row, columns and mask; neighbouring programs read neighbouring columns."""
    row = (tl.program_id(0) // COLUMNS).to(tl.int64)
    column = (tl.program_id(0) % COLUMNS) * BLOCK + tl.arange(0, BLOCK)
    return row, column, column < size


@triton.jit
def activate(z, IS_SILU: tl.constexpr):
    """act(z) and its derivative."""
    if IS_SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        value = z * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid)
    else:
        cubic = z * z * _CUBIC
        share = 1.0 / (1.0 + tl.exp(-z * (1.0 + cubic) * _SCALE))  # (1 + tanh) / 2
        value = z * share
        slope = share + value * (1.0 - share) * (1.0 + 3.0 * cubic) * _SCALE
    return value, slope


@triton.jit
def _activation(
    out, gate, up, size, gate_stride, up_stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, IS_SILU: tl.constexpr
):  # fmt: skip
    row, column, mask = _place(size, COLUMNS, BLOCK)
    z = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    value, _ = activate(z, IS_SILU)
    tl.store(out + row * size + column, (value * factor).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _activation_gradients(
    grad_gate, grad_up, gate, up, grad, size, gate_stride, up_stride, grad_stride, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, IS_SILU: tl.constexpr,
):  # fmt: skip
    row, column, mask = _place(size, COLUMNS, BLOCK)
    z = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    value, slope = activate(z, IS_SILU)
    target = row * size + column
    tl.store(grad_gate + target, (g * factor * slope).to(grad_gate.dtype.element_ty), mask=mask)
    tl.store(grad_up + target, (g * value).to(grad_up.dtype.element_ty), mask=mask)


def launch_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, contiguous."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    (gate, gate_stride), (up, up_stride) = _rows(gate), _rows(up)
    grid, options = _launch(gate, activation)
    with torch.cuda.device_of(out):
        _activation[grid](out, gate, up, gate.shape[1], gate_stride, up_stride, **options)
    return out


def launch_activation_gradients(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """d gate and d up, contiguous."""
    grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    (gate, gate_stride), (up, up_stride), (grad, grad_stride) = _rows(gate), _rows(up), _rows(grad)
    grid, options = _launch(gate, activation)
    with torch.cuda.device_of(grad_gate):
        _activation_gradients[grid](
            grad_gate, grad_up, gate, up, grad, gate.shape[1], gate_stride, up_stride, grad_stride, **options
        )
    return grad_gate, grad_up


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x as [rows, I] with adjacent features, a view where possible, and the stride of its rows."""
    x = x.reshape(-1, x.shape[-1])
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


def _launch(gate: Tensor, activation: str) -> tuple[tuple[int], dict[str, int | bool]]:
    columns = cdiv(gate.shape[1], _BLOCK)
    options = {"COLUMNS": columns, "BLOCK": _BLOCK, "IS_SILU": activation == "silu", "num_warps": 4}
    return (len(gate) * columns,), options
