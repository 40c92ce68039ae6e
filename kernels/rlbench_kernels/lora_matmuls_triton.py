"""The buffers of `lora_matmuls`' form "extended" filled on CUDA: one launch, 16 bytes a thread.

Shapes: N rows, D columns before the trailing ones, R of these with values.
"""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlbench_kernels.launch import cdiv, next_power_of_2

_TILE = 4096  # numbers of a program
_COLUMNS = 1024  # of them side by side, where rows are long


@triton.jit(do_not_specialize=["num_rows"])
def _write(
    out, left, right, num_rows, out_stride, left_stride, right_row_stride, right_column_stride, first, D, R,
    num_columns, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program: ROWS rows, BLOCK columns from `first` on: of left, where there is one, of right, then zeros."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = first + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_row = row < num_rows
    is_right = is_row & (column >= D) & (column < D + R)
    source = right + row * right_row_stride + (column - D) * right_column_stride
    value = tl.load(source, mask=is_right, other=0.0)
    if left is not None:
        is_left = is_row & (column < D)
        value = tl.where(is_left, tl.load(left + row * left_stride + column, mask=is_left, other=0.0), value)
    tl.store(out + row * out_stride + column, value, mask=is_row & (column < num_columns))


def launch_write(out: Tensor, left: Tensor | None, right: Tensor, depth: int) -> None:
    """See `lora_matmuls._write_side_by_side`; the dtypes are one."""
    num_rows, num_columns = out.shape
    first = depth if left is None else 0
    block = min(_COLUMNS, next_power_of_2(num_columns - first))
    rows = _TILE // block
    assert out.stride(1) == 1
    left = left if left is None or left.stride(1) == 1 else left.contiguous()
    with torch.cuda.device_of(out):
        _write[(cdiv(num_rows, rows), cdiv(num_columns - first, block))](
            out, left, right, num_rows, out.stride(0), 0 if left is None else left.stride(0), *right.stride(), first,
            depth, right.shape[1], num_columns, BLOCK=block, ROWS=rows, num_warps=4,
        )  # fmt: skip
