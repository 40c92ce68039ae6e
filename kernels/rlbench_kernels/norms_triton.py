"""`norms` on CUDA: one kernel a direction, whole rows in registers, several rows a program where D is small.

The gradient of the weight is summed per program, in float32, then over the programs: no atomics, same bits each run.

Shapes: rows of D features; a tile is ROWS x BLOCK.
"""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlbench_kernels.launch import cdiv, next_power_of_2

_TILE = 2048  # elements of a program whose rows are shorter
_ELEMENTS_OF_A_ROW = 32  # that a thread holds, one row a program; half as many where it sums the weight's gradient
_ELEMENTS_OF_SHORT_ROWS = 8  # that a thread holds, several rows a program
_PROGRAMS_PER_SM = 4  # that sum the weight's gradient


@triton.jit
def _row_offsets(row, inner, outer_stride, inner_stride):
    """Of rows numbered over [outer, inner]; inner None: evenly spaced, no division before the first load."""
    if inner is None:
        offsets = row.to(tl.int64) * outer_stride
    else:
        offsets = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    return offsets[:, None]


@triton.jit(do_not_specialize=["num_rows", "inner"])
def _norm(
    out, new_residual, x, residual, weight, num_rows, inner, outer_stride, inner_stride, eps, offset,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    """Row program: out = n(x) (weight + offset); with a residual, x + residual takes the place of x."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (ROWS, BLOCK))
    is_column = column < D
    mask = (row < num_rows)[:, None] & is_column
    place = row.to(tl.int64)[:, None] * D + column
    source = _row_offsets(row, inner, outer_stride, inner_stride) + column
    value = tl.load(x + source, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=is_column, other=0.0)
    if HAS_RESIDUAL:
        rounded = value.to(x.dtype.element_ty)
        tl.store(new_residual + place, rounded, mask=mask)
        value = rounded.to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
    if HAS_OFFSET:
        normed = normed * (w.to(tl.float32) + offset)
    else:
        normed = normed.to(x.dtype.element_ty).to(tl.float32) * w.to(tl.float32)
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _tile_gradients(
    tile, grad_x, x, weight, grad, grad_residual, num_rows, inner, outer_stride, inner_stride, grad_inner,
    grad_outer_stride, grad_inner_stride, eps, offset, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Stores the tile's grad_x; its share of grad_weight, [ROWS, BLOCK].

    sum(x^2) and sum(g w x) in one reduction: the warps exchange their sums once, and all loads are on their way before.
    """
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (ROWS, BLOCK))
    is_column = column < D
    mask = (row < num_rows)[:, None] & is_column
    place = row.to(tl.int64)[:, None] * D + column
    source = _row_offsets(row, inner, outer_stride, inner_stride) + column
    grad_source = _row_offsets(row, grad_inner, grad_outer_stride, grad_inner_stride) + column
    value = tl.load(x + source, mask=mask, other=0.0)
    g = tl.load(grad + grad_source, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        added = tl.load(grad_residual + place, mask=mask, other=0.0)
    w = tl.load(weight + column, mask=is_column, other=0.0)
    value, g = value.to(tl.float32), g.to(tl.float32)
    scaled = g * (w.to(tl.float32) + offset)
    squares, dots = tl.split(tl.sum(tl.join(value * value, scaled * value), 1))
    inverse = tl.rsqrt(squares / D + eps)
    mean = dots * inverse / D  # of g w n(x)
    result = (scaled - value * (mean * inverse)[:, None]) * inverse[:, None]
    if HAS_RESIDUAL:
        result += added.to(tl.float32)
    tl.store(grad_x + place, result.to(grad_x.dtype.element_ty), mask=mask)
    return tl.where(mask, g * value * inverse[:, None], 0.0)  # a row beyond the end has inverse inf where eps is 0


@triton.jit(do_not_specialize=["num_rows", "inner", "grad_inner"])
def _norm_gradients(
    grad_x, grad_weight, x, weight, grad, grad_residual, num_rows, inner, outer_stride, inner_stride, grad_inner,
    grad_outer_stride, grad_inner_stride, eps, offset, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """grad_x: of one tile a program, or of every tile with each program's share of grad_weight [programs, D]."""
    if HAS_WEIGHT:
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
            total += _tile_gradients(
                tile, grad_x, x, weight, grad, grad_residual, num_rows, inner, outer_stride, inner_stride, grad_inner,
                grad_outer_stride, grad_inner_stride, eps, offset, D, BLOCK, ROWS, HAS_RESIDUAL,
            )  # fmt: skip
        target = grad_weight + tl.program_id(0).to(tl.int64) * D + tl.arange(0, BLOCK)
        tl.store(target, tl.sum(total, 0), mask=tl.arange(0, BLOCK) < D)
    else:
        _tile_gradients(
            tl.program_id(0), grad_x, x, weight, grad, grad_residual, num_rows, inner, outer_stride, inner_stride,
            grad_inner, grad_outer_stride, grad_inner_stride, eps, offset, D, BLOCK, ROWS, HAS_RESIDUAL,
        )  # fmt: skip


def launch_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor | None]:
    """The normed values, and x + residual where there is a residual; x [..., D]."""
    size = weight.shape[0]
    dtype = x.dtype if offset or weight.dtype == x.dtype else torch.promote_types(x.dtype, weight.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    new_residual = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, options = x.numel() // size, _tile(size)
    source, *layout = _layout(x)
    with torch.cuda.device_of(x):
        _norm[(cdiv(num_rows, options["ROWS"]),)](
            out, new_residual, source, None if residual is None else residual.contiguous(), weight.contiguous(),
            num_rows, *layout, eps, offset, D=size, HAS_RESIDUAL=residual is not None, HAS_OFFSET=offset != 0.0,
            **options,
        )  # fmt: skip
    return out, new_residual


def launch_norm_gradients(
    x: Tensor, weight: Tensor, grad: Tensor, grad_residual: Tensor | None, eps: float, offset: float,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """d x, with `grad_residual` added, and d weight where it is needed."""
    size = weight.shape[0]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, options = x.numel() // size, _tile(size, needs_weight)
    num_programs = cdiv(num_rows, options["ROWS"])
    parts = None
    if needs_weight:
        num_programs = min(num_programs, _PROGRAMS_PER_SM * _num_sms(x.device))
        parts = torch.empty((num_programs, size), dtype=torch.float32, device=x.device)
    source, *layout = _layout(x)
    grad, *grad_layout = _layout(grad)
    with torch.cuda.device_of(x):
        _norm_gradients[(num_programs,)](
            grad_x, parts, source, weight.contiguous(), grad,
            None if grad_residual is None else grad_residual.contiguous(), num_rows, *layout, *grad_layout, eps,
            offset, D=size, HAS_RESIDUAL=grad_residual is not None, HAS_WEIGHT=needs_weight, **options,
        )  # fmt: skip
    return grad_x, None if parts is None else parts.sum(0).to(weight.dtype)


def _layout(x: Tensor) -> tuple[Tensor, int | None, int, int]:
    """x as [outer, inner, D] with adjacent features: the tensor, inner, and both strides. A view where possible.

    Evenly spaced rows have no inner dimension: inner None, and the stride from row to row.
    """
    if x.is_contiguous():
        return x, None, x.shape[-1], 0
    if x.ndim != 3:
        x = x.reshape(-1, x.shape[-2] if x.ndim > 1 else 1, x.shape[-1])
    if x.stride(-1) != 1:
        x = x.contiguous()
    # an only row's stride would change with the number of tokens, and with it the compiled kernel
    return x, x.shape[1], x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)


@cache
def _tile(size: int, has_sums: bool = False) -> dict[str, int]:
    """Elements of a thread: 32 of one row, 16 beside sums of as many; 8 where a program has several rows.

    ptxas takes a thread's rows one after the other, and loads the second when the first has arrived.
    """
    block = next_power_of_2(size)
    rows = max(1, _TILE // block)
    of_a_row = _ELEMENTS_OF_A_ROW // 2 if has_sums else _ELEMENTS_OF_A_ROW
    per_warp = 32 * (_ELEMENTS_OF_SHORT_ROWS if rows > 1 else of_a_row)
    return {"BLOCK": block, "ROWS": rows, "num_warps": min(16, max(1, rows * block // per_warp))}


@cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
