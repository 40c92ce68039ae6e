"""Matrices in FP8 with one scale a row: weight[o, d] = code[o, d] * scale[o], codes in float8_e4m3fn.

One scale for the whole matrix is a view of it on every row, `scale.expand(O, 1)`.

Shapes: O out features, D in features.
Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3; vLLM 0.26, Fp8PtpcOnlineLinearMethod in
model_executor/layers/quantization/online/fp8.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlbench_kernels.launch import use_triton

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_SCALE = 1 / (LARGEST * 512)  # of a row of zeros too


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """A frozen matrix [O, D]; `codes` and `scale` may be views of someone else's bytes.

    vLLM keeps codes as [D, O] over rows of D codes, maybe padded: their transpose is such a view.

    Example:
        >>> weight = quantize_fp8(torch.tensor([[1.0, -1.75], [0.0, 0.5]]))
        >>> dequantize_fp8(weight)
        tensor([[ 1.0000, -1.7500],
                [ 0.0000,  0.5000]])
    """

    codes: Tensor  # float8_e4m3fn [O, D], unit stride along D
    scale: Tensor  # float32 [O, 1], any strides
    dtype: torch.dtype  # of the matrix that was quantised, and of the dense result

    def __post_init__(self) -> None:
        codes, scale = self.codes, self.scale
        if codes.ndim != 2 or codes.dtype != FP8 or (codes.shape[1] > 1 and codes.stride(1) != 1):
            raise ValueError(
                f"codes: {FP8} [O, D] with unit stride along D expected, got {codes.dtype} {[*codes.shape]} with "
                f"strides {codes.stride()}"
            )
        if scale.dtype != torch.float32 or scale.shape != (len(codes), 1) or scale.device != codes.device:
            raise ValueError(
                f"scale: torch.float32 [{len(codes)}, 1] on {codes.device} expected, got {scale.dtype} "
                f"{[*scale.shape]} on {scale.device}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codes.device


def quantize_fp8(tensor: Tensor) -> Fp8Weight:
    """The codes nearest to tensor / scale (ties to the even code), scale = largest magnitude of the row / 448.

    Args:
        tensor: [O, D], float32, bfloat16 or float16.

    Raises:
        ValueError: not a matrix of those dtypes.
    """
    if tensor.ndim != 2 or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"a matrix in float32, bfloat16 or float16 expected, got {tensor.dtype} {[*tensor.shape]}")
    values = tensor.detach().float()
    absmax = values.abs().amax(1, keepdim=True)
    # by a tensor: on CUDA torch divides by a number as it multiplies by its reciprocal, vLLM does not
    scale = (absmax / torch.full_like(absmax, LARGEST)).clamp(min=SMALLEST_SCALE)
    return Fp8Weight((values / scale).clamp_(-LARGEST, LARGEST).to(FP8), scale, tensor.dtype)


def dequantize_fp8(weight: Fp8Weight, out: Tensor | None = None) -> Tensor:
    """The dense matrix [O, D]: code * scale in float32, rounded once to the result's dtype.

    One launch on CUDA; PyTorch operations, which pass over the result twice, elsewhere and for float64.

    Args:
        weight: see `Fp8Weight`.
        out: [O, D], any floating dtype of 16 bits or more and any strides, e.g. the first D columns of a wider buffer;
            or None for a new tensor in the weight's dtype.

    Returns:
        `out`.

    Raises:
        ValueError: `out` has another shape, dtype or device.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if tuple(out.shape) != weight.shape or not out.is_floating_point() or out.element_size() < 2:
        raise ValueError(f"out: floating [{weight.shape[0]}, {weight.shape[1]}], got {out.dtype} {[*out.shape]}")
    if out.device != weight.device:
        raise ValueError(f"out is on {out.device}, the weight on {weight.device}")
    if use_triton(out.device) and out.dtype != torch.float64 and out.numel() > 0:
        from rlbench_kernels.fp8_triton import launch_dequantize

        launch_dequantize(weight, out)
        return out
    return reference_dequantize(weight, out)


def reference_dequantize(weight: Fp8Weight, out: Tensor) -> Tensor:
    """As `dequantize_fp8` in PyTorch: the meaning of the op, and its CPU version."""
    return out.copy_(weight.codes).mul_(weight.scale)  # the codes are exact in 16 bits
