"""Keys and values gathered, and the gradients of their copies summed, on CUDA: one launch for both tensors.

Shapes: T packed tokens, S gathered keys, F = Hk d numbers of a row.
"""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlbench_kernels.launch import cdiv, next_power_of_2

_TILE = 4096  # numbers that a program copies of each tensor
_COLUMNS = 1024  # of a row that a program sums


@triton.jit(do_not_specialize=["num_keys"])
def _gather(
    k, v, out_k, out_v, rows, num_keys, k_stride, v_stride, F: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program: ROWS rows of `out_k` and `out_v` [S, F]."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + place, mask=place < num_keys, other=0).to(tl.int64)[:, None]
    target = place.to(tl.int64)[:, None] * F
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = (place < num_keys)[:, None] & (column < F)
        one = tl.load(k + row * k_stride + column, mask=mask)
        other = tl.load(v + row * v_stride + column, mask=mask)
        tl.store(out_k + target + column, one, mask=mask)
        tl.store(out_v + target + column, other, mask=mask)


@triton.jit
def _sum(k_parts, v_parts, out_k, out_v, copies, copy_starts, F: tl.constexpr, BLOCK: tl.constexpr):
    """Program: one row of `out_k` and `out_v` [T, F], BLOCK columns: the sum of its copies in `k_parts` [S, F]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    total_k = tl.zeros((BLOCK,), tl.float32)
    total_v = tl.zeros((BLOCK,), tl.float32)
    for index in range(tl.load(copy_starts + row), tl.load(copy_starts + row + 1)):
        place = tl.load(copies + index).to(tl.int64) * F + column
        total_k += tl.load(k_parts + place, mask=mask, other=0.0).to(tl.float32)
        total_v += tl.load(v_parts + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_k + row * F + column, total_k.to(out_k.dtype.element_ty), mask=mask)
    tl.store(out_v + row * F + column, total_v.to(out_v.dtype.element_ty), mask=mask)


def launch_gather(k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """See `gathered_attention.gather_rows`."""
    size = k.shape[1] * k.shape[2]
    k, v = _with_whole_rows(k), _with_whole_rows(v)
    out_k, out_v = (x.new_empty((len(rows), *x.shape[1:])) for x in (k, v))
    block = min(_TILE, next_power_of_2(size))
    num_rows = _TILE // block
    with torch.cuda.device_of(k):
        _gather[(cdiv(len(rows), num_rows),)](
            k, v, out_k, out_v, rows, len(rows), k.stride(0), v.stride(0), F=size, BLOCK=block, ROWS=num_rows,
            num_warps=8,
        )  # fmt: skip
    return out_k, out_v


def launch_sums(k_parts: Tensor, v_parts: Tensor, copies: Tensor, copy_starts: Tensor) -> tuple[Tensor, Tensor]:
    """See `gathered_attention.sum_copies`."""
    num_rows, size = len(copy_starts) - 1, k_parts.shape[1] * k_parts.shape[2]
    k_parts, v_parts = k_parts.contiguous(), v_parts.contiguous()
    out_k, out_v = (x.new_empty((num_rows, *x.shape[1:])) for x in (k_parts, v_parts))
    block = min(_COLUMNS, next_power_of_2(size))
    with torch.cuda.device_of(k_parts):
        _sum[(num_rows, cdiv(size, block))](
            k_parts, v_parts, out_k, out_v, copies, copy_starts, F=size, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out_k, out_v


def _with_whole_rows(x: Tensor) -> Tensor:
    """The same [T, Hk, d], the numbers of a row side by side."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
