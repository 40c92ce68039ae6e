"""`merge_lora_` on CUDA: one kernel, the matrix read and written once.

Shapes: O out features, D in features, R rank.
"""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlbench_kernels.launch import cdiv
from rlbench_kernels.merge_lora import HASH_FACTORS

_ROWS, _COLUMNS = 64, 128  # of one program


@triton.jit
def _load(bits, mask):
    """bfloat16 as its bits in memory, in float32; tf32 products of such numbers are exact."""
    wide = tl.load(bits, mask=mask, other=0).to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    return wide.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["seed"])
def _merge(
    weight, lora_a, lora_b, num_rows, depth, rank, row_stride, a_stride, b_stride, seed, FIRST: tl.constexpr,
    SECOND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(depth, COLUMNS)
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    update = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rank, RANKS):
        place = start + tl.arange(0, RANKS)
        b_mask = (row[:, None] < num_rows) & (place[None, :] < rank)
        b = _load(lora_b + row[:, None] * b_stride + place[None, :], b_mask)
        a_mask = (place[:, None] < rank) & (column[None, :] < depth)
        a = _load(lora_a + place[:, None] * a_stride + column[None, :], a_mask)
        update = tl.dot(b, a, update)
    mask = (row[:, None] < num_rows) & (column[None, :] < depth)
    target = weight + row[:, None].to(tl.int64) * row_stride + column[None, :]
    value = _load(target, mask) + update
    x = (row[:, None] * depth + column[None, :]).to(tl.uint32) ^ seed.to(tl.uint32, bitcast=True)
    x = x ^ (x >> 16)
    x = x * FIRST
    x = x ^ (x >> 15)
    x = x * SECOND
    x = x ^ (x >> 16)
    bits = value.to(tl.uint32, bitcast=True) + (x >> 16)
    tl.store(target, (bits >> 16).to(tl.int16), mask=mask)


def launch_merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, seed: int) -> None:
    """As `merge_lora_`, after its checks."""
    lora_a, lora_b = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (lora_a, lora_b))
    bits = [tensor.view(torch.int16) for tensor in (weight, lora_a, lora_b)]
    (num_rows, depth), rank = weight.shape, lora_a.shape[0]
    grid = (cdiv(num_rows, _ROWS) * cdiv(depth, _COLUMNS),)
    with torch.cuda.device_of(weight):
        _merge[grid](
            *bits, num_rows, depth, rank, weight.stride(0), lora_a.stride(0), lora_b.stride(0),
            seed - (1 << 32) if seed >= 1 << 31 else seed, FIRST=HASH_FACTORS[0], SECOND=HASH_FACTORS[1], ROWS=_ROWS,
            COLUMNS=_COLUMNS, RANKS=16 if rank <= 16 else 32, num_warps=4,
        )  # fmt: skip
