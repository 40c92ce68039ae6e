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

from rlbench_kernels.launch import cdiv
from rlbench_kernels.nf4 import Nf4Weight

_WORDS = 256  # of one program, eight elements each
_LARGEST_BLOCK = 4096


@triton.jit
def _dequantize(
    words, pairs, absmax, nested_absmax, nested_code, offset, out, first_block, num_words, words_per_row, row_stride,
    WORDS: tl.constexpr, SIZE: tl.constexpr, NESTED_SIZE: tl.constexpr,
):  # fmt: skip
    """Program: WORDS words of blocks of SIZE elements; NESTED_SIZE is 0 without double quantisation."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    is_word = word < num_words
    bits = tl.load(words + word, mask=is_word, other=0)
    block = word // (SIZE // 8)
    scale = tl.load(absmax + block, mask=is_word, other=0)
    if NESTED_SIZE > 0:
        outer = (first_block + block) // NESTED_SIZE
        nested = tl.load(nested_absmax + outer, mask=is_word, other=0.0)
        # compiled without fused multiply-add: bitsandbytes rounds the product
        scale = tl.load(nested_code + scale.to(tl.int32)) * nested + tl.load(offset + outer, mask=is_word, other=0.0)
    byte = (bits[:, None] >> (8 * tl.arange(0, 4))[None, :]) & 255
    pair = tl.load(pairs + byte)  # [WORDS, 4], the two float32 values of a byte
    first = pair.to(tl.int32).to(tl.float32, bitcast=True) * scale[:, None]
    second = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True) * scale[:, None]
    value = tl.join(first, second).reshape(WORDS, 8)
    row = word // words_per_row
    start = row.to(tl.int64) * row_stride + (word - row * words_per_row) * 8
    target = out + start[:, None] + tl.arange(0, 8)[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=is_word[:, None])


def can_launch(weight: Nf4Weight, out: Tensor) -> bool:
    """Whether every block lies in one row of the result, in whole aligned words."""
    whole = weight.shape[0] * weight.shape[1] if out.is_contiguous() else weight.shape[1]
    return (
        whole % weight.blocksize == 0
        and 8 <= weight.blocksize <= _LARGEST_BLOCK
        and weight.packed.is_contiguous()
        and weight.packed.data_ptr() % 4 == 0
        and weight.absmax.is_contiguous()
    )


def launch_dequantize(weight: Nf4Weight, byte_words: Tensor, out: Tensor) -> None:
    """Write the dense matrix [O, D] to out; after `can_launch`. `byte_words`: int64 [256, 1], two float32 each."""
    nested = weight.nested
    num_words = weight.shape[0] * weight.shape[1] // 8
    per_row = num_words if out.is_contiguous() else weight.shape[1] // 8
    with torch.cuda.device_of(out):
        _dequantize[(cdiv(num_words, _WORDS),)](
            weight.packed.view(torch.int32), byte_words, weight.absmax,
            *((None, None, None, out, 0) if nested is None else
              (nested.absmax, nested.code, nested.offset, out, nested.first_block)),
            num_words, per_row, out.stride(0), WORDS=_WORDS, SIZE=weight.blocksize,
            NESTED_SIZE=0 if nested is None else nested.blocksize, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
