"""`lora_dropout` on CUDA: the mask of a number is a function of seed, column and row. Rows may be strided.

Shapes: N tokens, D features.
"""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlbench_kernels.launch import cdiv

_QUARTER = 256  # one call of Philox gives four numbers: those of the four quarters of a block


@triton.jit
def _drop_quarter(rows, out, column, size, bits, p, scale, ADD: tl.constexpr):
    mask = column < size
    x = tl.load(rows + column, mask=mask, other=0.0).to(tl.float32)
    value = tl.where(tl.uint_to_uniform_float(bits) >= p, x * scale, 0.0)
    if ADD:
        value += tl.load(out + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _drop(
    rows, out, size, stride, out_stride, p, scale, seed_low, seed_high, COLUMNS: tl.constexpr, QUARTER: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    seed = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
    row, block = tl.program_id(0) // COLUMNS, tl.program_id(0) % COLUMNS
    place = tl.arange(0, QUARTER)
    zeros = tl.zeros([QUARTER], tl.int32)
    a, b, c, d = tl.philox(seed, block * QUARTER + place, zeros + row, zeros, zeros)
    rows += row.to(tl.int64) * stride
    out += row.to(tl.int64) * out_stride
    first = block * 4 * QUARTER + place
    _drop_quarter(rows, out, first, size, a, p, scale, ADD)
    _drop_quarter(rows, out, first + QUARTER, size, b, p, scale, ADD)
    _drop_quarter(rows, out, first + 2 * QUARTER, size, c, p, scale, ADD)
    _drop_quarter(rows, out, first + 3 * QUARTER, size, d, p, scale, ADD)


def launch_drop(rows: Tensor, p: float, seed: int, add_to: Tensor | None) -> Tensor:
    """As `rlbench_kernels.lora_dropout.drop`; sums are rounded once."""
    num_rows, size = rows.shape
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) if add_to is None else add_to
    assert out.stride(1) == 1
    columns = cdiv(size, 4 * _QUARTER)
    with torch.cuda.device_of(out):
        _drop[(num_rows * columns,)](
            rows, out, size, rows.stride(0), out.stride(0), p, 1 / (1 - p), *_words(seed), COLUMNS=columns,
            QUARTER=_QUARTER, ADD=add_to is not None,
        )  # fmt: skip
    return out


def _words(seed: int) -> tuple[int, int]:
    """Low and high word as signed 32-bit numbers: an argument of 64 bits would be another kernel for small seeds."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return low - (1 << 32) if low >= 1 << 31 else low, high
