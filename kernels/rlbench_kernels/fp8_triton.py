"""`dequantize_fp8` on CUDA: one kernel, which reads the codes as bytes and so needs no GPU that multiplies FP8.

Shapes: O out features, D in features.
"""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlbench_kernels.fp8 import Fp8Weight
from rlbench_kernels.launch import cdiv

_ROWS, _COLUMNS = 8, 512  # of one program; a warp reads 512 codes of a row, 16 a thread
_FIELDS = tl.constexpr(0x87F00000 - 2**32)  # where sign, exponent and mantissa of a code lie in a float32
_REBIAS = tl.constexpr(2.0**120)  # a float32's exponents count from 127, those of codes from 7


@triton.jit
def _dequantize(
    codes, scale, out, num_rows, num_columns, code_stride, scale_stride, out_stride, out_column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program: ROWS x COLUMNS numbers."""
    num_blocks = tl.cdiv(num_columns, COLUMNS)
    row = tl.program_id(0) // num_blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % num_blocks * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    start = row.to(tl.int64)[:, None]
    code = tl.load(codes + start * code_stride + column[None, :], mask=mask, other=0).to(tl.int32)
    value = ((code << 20) & _FIELDS).to(tl.float32, bitcast=True) * _REBIAS  # exact
    value = tl.where(tl.abs(value) == 480.0, float("nan"), value)  # the codes of nan, which would be 480
    value *= tl.load(scale + row.to(tl.int64) * scale_stride, mask=row < num_rows, other=0.0)[:, None]
    target = out + start * out_stride + column.to(tl.int64)[None, :] * out_column_stride
    tl.store(target, value.to(out.dtype.element_ty), mask=mask)


def launch_dequantize(weight: Fp8Weight, out: Tensor) -> None:
    """Write the dense matrix [O, D] to out: float32, bfloat16 or float16, of any strides, not empty."""
    num_rows, num_columns = weight.shape
    num_programs = cdiv(num_rows, _ROWS) * cdiv(num_columns, _COLUMNS)
    with torch.cuda.device_of(out):
        _dequantize[(num_programs,)](
            weight.codes.view(torch.int8), weight.scale, out, num_rows, num_columns, weight.codes.stride(0),
            weight.scale.stride(0), *out.stride(), ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip
