"""Joins two parts of an attention on CUDA, in one pass over both.

Shapes: T packed tokens, C rows to join, H heads, d features of a head.
"""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlbench_kernels.launch import next_power_of_2

_TILE = 4096  # elements that a program holds at a time


@triton.jit
def _join(
    out, lse, other, other_lse, rows, stride, head_stride, other_stride, other_head_stride, lse_stride,
    other_lse_stride, H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row program: out = exp(lse - l) out + exp(other_lse - l) other, lse = l = logaddexp(lse, other_lse)."""
    row = tl.load(rows + tl.program_id(0))
    d = tl.arange(0, BLOCK_D)[None, :]
    for start in range(0, H, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)
        is_head = head < H
        mine = tl.load(lse + head * lse_stride + row, mask=is_head, other=0.0)
        theirs = tl.load(other_lse + head * other_lse_stride + row, mask=is_head, other=0.0)
        highest = tl.maximum(mine, theirs)
        joined = highest + tl.log(tl.exp(mine - highest) + tl.exp(theirs - highest))
        mask = is_head[:, None] & (d < D)
        target = out + row * stride + head[:, None] * head_stride + d
        value = tl.load(target, mask=mask, other=0.0).to(tl.float32) * tl.exp(mine - joined)[:, None]
        source = other + row * other_stride + head[:, None] * other_head_stride + d
        value += tl.load(source, mask=mask, other=0.0).to(tl.float32) * tl.exp(theirs - joined)[:, None]
        tl.debug_barrier()  # several threads may have read what one of them now overwrites
        tl.store(target, value.to(out.dtype.element_ty), mask=mask)
        tl.store(lse + head * lse_stride + row, joined, mask=is_head)


def launch_join(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, rows: Tensor) -> None:
    """See `packed_attention.join_parts`."""
    num_heads, dim = out.shape[1:]
    assert out.stride(2) == other.stride(2) == lse.stride(1) == other_lse.stride(1) == 1
    block_d = next_power_of_2(dim)
    block_h = min(next_power_of_2(num_heads), max(1, _TILE // block_d))
    with torch.cuda.device_of(out):
        _join[(len(rows),)](
            out, lse, other, other_lse, rows, *out.stride()[:2], *other.stride()[:2], lse.stride(0),
            other_lse.stride(0), H=num_heads, D=dim, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
