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

_WORDS, _NUM_WARPS = 512, 4  # of one program, eight elements a word
_LARGEST_BLOCK = 4096  # at most _WORDS words


# without knowing how `words` is aligned, a warp reads 32 words in a row, in the layout of its 16-byte stores
@triton.jit(do_not_specialize_on_alignment=["words"])
def _dequantize(
    words, codes, absmax, nested_absmax, nested_code, offset, out, first_block, num_words, blocks_per_row, row_gap,
    WORDS: tl.constexpr, SIZE: tl.constexpr, NESTED_SIZE: tl.constexpr, IS_PADDED: tl.constexpr,
):  # fmt: skip
    """Program: WORDS words in blocks of SIZE elements; NESTED_SIZE is 0 without double quantisation.

    Values and scales are looked up in shared memory. 16 codes lie in 16 banks, so that no two lanes of a warp wait for
    each other; a table of the 256 bytes' pairs would take up to 16 cache lines a load.
    """
    PER_BLOCK: tl.constexpr = SIZE // 8
    BLOCKS: tl.constexpr = WORDS // PER_BLOCK
    first_word = tl.program_id(0) * WORDS
    word = tl.arange(0, WORDS)
    is_word = word < num_words - first_word
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    is_block = block < num_words // PER_BLOCK
    bits = tl.load(words + first_word + word, mask=is_word, other=0)
    scale = tl.load(absmax + block, mask=is_block, other=0)
    code = tl.load(codes + tl.arange(0, 16))
    if NESTED_SIZE > 0:
        outer = (first_block + block) // NESTED_SIZE
        nested = tl.load(nested_absmax + outer, mask=is_block, other=0.0)
        shift = tl.load(offset + outer, mask=is_block, other=0.0)
        tl.debug_barrier()  # or ptxas waits for absmax before it asks for the words
        # compiled without fused multiply-add: bitsandbytes rounds the product
        scale = tl.load(nested_code + scale.to(tl.int32)) * nested + shift
    start = first_word.to(tl.int64) * 8 + word * 8
    if IS_PADDED:
        start += tl.gather(block // blocks_per_row, word // PER_BLOCK, 0).to(tl.int64) * row_gap
    scale = tl.gather(scale, word // PER_BLOCK, 0)
    nibble = (bits[:, None] >> (tl.arange(0, 8) * 4 ^ 4)[None, :]) & 15  # the high one of a byte first
    value = tl.gather(code, nibble.reshape(WORDS * 8), 0).reshape(WORDS, 8) * scale[:, None]
    target = out + start[:, None] + tl.arange(0, 8)[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=is_word[:, None])


def can_launch(weight: Nf4Weight, out: Tensor) -> bool:
    """Whether every block lies in one row of the result, in a power of two of whole aligned words."""
    whole = weight.shape[0] * weight.shape[1] if out.is_contiguous() else weight.shape[1]
    return (
        whole % weight.blocksize == 0
        and weight.blocksize & (weight.blocksize - 1) == 0
        and 8 <= weight.blocksize <= _LARGEST_BLOCK
        and weight.packed.is_contiguous()
        and weight.packed.data_ptr() % 4 == 0
        and weight.absmax.is_contiguous()
    )


def launch_dequantize(weight: Nf4Weight, code: Tensor, out: Tensor) -> None:
    """Write the dense matrix [O, D] to out; after `can_launch`. `code`: the 16 values, float32."""
    nested = weight.nested
    num_rows, num_columns = weight.shape
    num_words = num_rows * num_columns // 8
    with torch.cuda.device_of(out):
        _dequantize[(cdiv(num_words, _WORDS),)](
            weight.packed.view(torch.int32), code, weight.absmax,
            *((None, None, None, out, 0) if nested is None else
              (nested.absmax, nested.code, nested.offset, out, nested.first_block)),
            num_words, num_columns // weight.blocksize, out.stride(0) - num_columns, WORDS=_WORDS,
            SIZE=weight.blocksize, NESTED_SIZE=0 if nested is None else nested.blocksize,
            IS_PADDED=not out.is_contiguous(), num_warps=_NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
