"""`dequantize_nf4` on CUDA: one kernel, reading the 4-bit codes as words of eight.

Shapes: O out features, D in features, b blocks.
"""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlbench_kernels.nf4 import Nf4Weight

_ELEMENTS = 4096  # of one program


@triton.jit
def _dequantize(
    words, code, absmax, nested_absmax, nested_code, offset, out, first_block, num_blocks, blocks_per_row, row_stride,
    BLOCKS: tl.constexpr, SIZE: tl.constexpr, NESTED_SIZE: tl.constexpr,
):  # fmt: skip
    """Program: BLOCKS blocks of SIZE elements; NESTED_SIZE is 0 without double quantisation."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    is_block = block < num_blocks
    scale = tl.load(absmax + block, mask=is_block, other=0)
    if NESTED_SIZE > 0:
        nested = tl.load(nested_absmax + (first_block + block) // NESTED_SIZE, mask=is_block, other=0.0)
        # compiled without fused multiply-add: bitsandbytes rounds the product
        scale = tl.load(nested_code + scale.to(tl.int32)) * nested + tl.load(offset)
    word = tl.arange(0, SIZE // 8)
    place = tl.arange(0, 8)
    wide = block.to(tl.int64)
    bits = tl.load(words + wide[:, None] * (SIZE // 8) + word[None, :], mask=is_block[:, None], other=0)
    shift = place // 2 * 8 + (1 - place % 2) * 4  # bytes in order, high half first
    nibble = (bits[:, :, None] >> shift[None, None, :]) & 15
    value = tl.load(code + nibble) * scale[:, None, None]
    row = block // blocks_per_row
    start = row.to(tl.int64) * row_stride + (block - row * blocks_per_row).to(tl.int64) * SIZE
    column = word[:, None] * 8 + place[None, :]
    target = out + start[:, None, None] + column[None, :, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=is_block[:, None, None])


def can_launch(weight: Nf4Weight, out: Tensor) -> bool:
    """Whether every block lies in one row of the result, in whole aligned words."""
    whole = weight.shape[0] * weight.shape[1] if out.is_contiguous() else weight.shape[1]
    return (
        whole % weight.blocksize == 0
        and 8 <= weight.blocksize <= _ELEMENTS
        and weight.packed.is_contiguous()
        and weight.packed.data_ptr() % 4 == 0
        and weight.absmax.is_contiguous()
    )


def launch_dequantize(weight: Nf4Weight, code: Tensor, out: Tensor) -> None:
    """Write the dense matrix [O, D] to out; after `can_launch`."""
    nested, num_blocks = weight.nested, len(weight.absmax)
    per_row = num_blocks if out.is_contiguous() else weight.shape[1] // weight.blocksize
    blocks = _ELEMENTS // weight.blocksize
    with torch.cuda.device_of(out):
        _dequantize[(triton.cdiv(num_blocks, blocks),)](
            weight.packed.view(torch.int32), code, weight.absmax,
            *((None, None, None, out, 0) if nested is None else
              (nested.absmax, nested.code, nested.offset, out, nested.first_block)),
            num_blocks, per_row, out.stride(0), BLOCKS=blocks, SIZE=weight.blocksize,
            NESTED_SIZE=0 if nested is None else nested.blocksize, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
