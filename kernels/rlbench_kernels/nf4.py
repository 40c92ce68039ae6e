"""NF4 weights in bitsandbytes' format: 4-bit codes with one scale a block, made dense in one launch.

weight[i] = code[nibble[i]] * absmax[i // blocksize], in float32, rounded once to the result's dtype. Two codes a byte,
the first in the high bits; blocks run over the row-major elements. With double quantisation
absmax[j] = nested.code[byte[j]] * nested.absmax[j // 256] + nested.offset[j // 256], each step rounded to float32;
bitsandbytes has one offset a matrix, matrices that are joined (`nf4_join`) have several.

Shapes: O out features, D in features, b blocks = O D / blocksize.
Source: Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E; bitsandbytes 0.50.2, backends/default/ops.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlbench_kernels.launch import use_triton

# appendix E of the paper, in float32
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class NestedAbsmax:
    """Double quantisation: absmax[j] = code[byte[j]] * absmax[k] + offset[k], k = (first_block + j) // blocksize."""

    absmax: Tensor  # float32 [blocks of blocks]
    code: Tensor  # float32 [256]
    offset: Tensor  # float32 [blocks of blocks], contiguous
    blocksize: int = 256
    first_block: int = 0  # above 0 in a row slice: where its first block lies in absmax[0]'s blocks

    def __post_init__(self) -> None:
        if self.offset.shape != self.absmax.shape or not self.offset.is_contiguous():
            raise ValueError(
                f"offset: contiguous [{len(self.absmax)}] expected, one a block of blocks, got {[*self.offset.shape]} "
                f"with strides {self.offset.stride()}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Nf4Weight:
    """A frozen matrix [O, D] in NF4; `packed` and `absmax` may be views of someone else's bytes.

    Example:
        >>> weight = quantize_nf4(torch.tensor([[-1.0, 0.0, 0.5, 1.0]]), blocksize=4)
        >>> dequantize_nf4(weight)
        tensor([[-1.0000,  0.0000,  0.4407,  1.0000]])
    """

    packed: Tensor  # uint8 [O D / 2, rounded up]
    absmax: Tensor  # float32 [b], or uint8 [b] with `nested`
    shape: tuple[int, int]
    dtype: torch.dtype  # of the matrix that was quantised, and of the dense result
    blocksize: int = 64
    nested: NestedAbsmax | None = None
    whole: Nf4Weight | None = None  # whose rows these are, from `first_row` on
    first_row: int = 0

    def __post_init__(self) -> None:
        numel = self.shape[0] * self.shape[1]
        if self.packed.dtype != torch.uint8 or self.packed.shape != ((numel + 1) // 2,):
            raise ValueError(
                f"packed: uint8 [{(numel + 1) // 2}] expected for [{self.shape[0]}, {self.shape[1]}], got "
                f"{self.packed.dtype} {[*self.packed.shape]}"
            )
        dtype = torch.float32 if self.nested is None else torch.uint8
        if self.absmax.dtype != dtype or self.absmax.shape != (-(-numel // self.blocksize),):
            raise ValueError(
                f"absmax: {dtype} [{-(-numel // self.blocksize)}] expected for blocks of {self.blocksize}, got "
                f"{self.absmax.dtype} {[*self.absmax.shape]}"
            )

    @classmethod
    def from_quant_state(cls, packed: Tensor, quant_state: Any) -> Nf4Weight:
        """The same bytes with bitsandbytes' QuantState, nothing copied.

        Args:
            packed: contiguous, uint8 or another storage dtype; as bitsandbytes' `quantize_4bit` returns it.
            quant_state: its second result, or anything with those attributes.

        Raises:
            ValueError: not NF4, not a matrix, or sizes that do not fit.
        """
        if quant_state.quant_type != "nf4":
            raise ValueError(f"quant_type 'nf4' expected, got {quant_state.quant_type!r}")
        if len(quant_state.shape) != 2:
            raise ValueError(f"a matrix expected, got shape {[*quant_state.shape]}")
        nested, absmax = None, quant_state.absmax
        if quant_state.state2 is not None:
            inner = quant_state.state2
            offset = torch.as_tensor(quant_state.offset, dtype=torch.float32, device=packed.device)
            scales = inner.absmax.float()
            nested = NestedAbsmax(scales, inner.code.float(), offset.expand(len(scales)).contiguous(), inner.blocksize)
        else:
            absmax = absmax.float()
        return cls(
            packed=packed.detach().view(-1).view(torch.uint8), absmax=absmax,
            shape=(quant_state.shape[0], quant_state.shape[1]), dtype=quant_state.dtype,
            blocksize=quant_state.blocksize, nested=nested,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def rows(self, start: int, stop: int) -> Nf4Weight:
        """Rows start:stop as views of the same bytes, e.g. q of a fused qkv weight.

        Raises:
            ValueError: D is no multiple of the blocksize, so that a block may hold parts of two rows; or not
                0 <= start <= stop <= O.
        """
        num_rows, depth = self.shape
        if depth % self.blocksize:
            raise ValueError(f"rows of {depth} columns cannot be cut from blocks of {self.blocksize}: no multiple")
        if not 0 <= start <= stop <= num_rows:
            raise ValueError(f"rows {start}:{stop} of a weight with {num_rows} rows")
        per_row = depth // self.blocksize
        return Nf4Weight(
            self.packed[start * depth // 2 : stop * depth // 2], self.absmax[start * per_row : stop * per_row],
            (stop - start, depth), self.dtype, self.blocksize, _advance(self.nested, start * per_row),
            self.whole or self, self.first_row + start,
        )  # fmt: skip


def dequantize_nf4(weight: Nf4Weight, out: Tensor | None = None) -> Tensor:
    """The dense matrix [O, D], with the bits of bitsandbytes' `dequantize_4bit`.

    One launch on CUDA, double quantisation included, where D is a multiple of the blocksize (or O D is, for a
    contiguous result); PyTorch operations otherwise.

    Args:
        weight: see `Nf4Weight`.
        out: [O, D], any floating dtype, unit stride along D, e.g. the first D columns of a wider buffer; or None for
            a new tensor in the weight's dtype.

    Returns:
        `out`.

    Raises:
        ValueError: `out` has another shape, device or layout.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    _check_out(weight, out)
    if out.numel() == 0:
        return out
    if use_triton(out.device):
        from rlbench_kernels.nf4_triton import can_launch, launch_dequantize

        if can_launch(weight, out):
            launch_dequantize(weight, nf4_code(out.device), out)
            return out
    return reference_dequantize(weight, out)


def reference_dequantize(weight: Nf4Weight, out: Tensor) -> Tensor:
    """As `dequantize_nf4` in PyTorch: the meaning of the op, and its CPU version."""
    numel = weight.shape[0] * weight.shape[1]
    values = _byte_codes(weight.device).index_select(0, weight.packed.int()).view(-1)[:numel]  # [O D], float32
    scales = dense_absmax(weight)
    num_whole = numel // weight.blocksize
    whole = values[: num_whole * weight.blocksize].view(num_whole, weight.blocksize)
    whole.mul_(scales[:num_whole, None])
    if len(scales) > num_whole:
        values[num_whole * weight.blocksize :].mul_(scales[num_whole])
    return out.copy_(values.view(weight.shape))


def dense_absmax(weight: Nf4Weight) -> Tensor:
    """The scale of each block, float32 [b]."""
    nested = weight.nested
    if nested is None:
        return weight.absmax
    block = torch.arange(nested.first_block, nested.first_block + len(weight.absmax), device=weight.device)
    block //= nested.blocksize
    return nested.code[weight.absmax.int()] * nested.absmax[block] + nested.offset[block]


def quantize_nf4(tensor: Tensor, blocksize: int = 64) -> Nf4Weight:
    """The NF4 codes nearest to tensor / absmax of its block; the bytes of bitsandbytes' `quantize_4bit`.

    A quotient on the midpoint of two codes takes the lower one; quotients are formed with the float32 reciprocal of
    absmax. A block of zeros takes code 7 (zero) and absmax 0. No double quantisation. bitsandbytes on CUDA computes
    the reciprocal approximately, so that a quotient within its rounding of a midpoint may take the other code there.

    Args:
        tensor: [O, D], float32, bfloat16 or float16.
        blocksize: a power of two, at least 2.

    Raises:
        ValueError: not a matrix of those dtypes, or another blocksize.
    """
    if tensor.ndim != 2 or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"a matrix in float32, bfloat16 or float16 expected, got {tensor.dtype} {[*tensor.shape]}")
    if blocksize < 2 or blocksize & (blocksize - 1):
        raise ValueError(f"blocksize: a power of two above 1 expected, got {blocksize}")
    values = tensor.detach().reshape(-1).float()
    padded = torch.nn.functional.pad(values, (0, -len(values) % blocksize)).view(-1, blocksize)
    absmax = padded.abs().amax(1)  # [b]
    scaled = padded * absmax.clamp(min=1e-38).reciprocal()[:, None]
    nibbles = torch.bucketize(scaled, _midpoints(tensor.device), out_int32=True).to(torch.uint8).view(-1, 2)
    packed = (nibbles[:, 0] << 4 | nibbles[:, 1])[: (len(values) + 1) // 2]
    return Nf4Weight(packed, absmax, (tensor.shape[0], tensor.shape[1]), tensor.dtype, blocksize)


@cache
def nf4_code(device: torch.device) -> Tensor:
    """The 16 values, float32 [16]; made once a device."""
    with torch.inference_mode(False):
        return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


@cache
def _byte_codes(device: torch.device) -> Tensor:
    """The two values of each byte, float32 [256, 2]."""
    with torch.inference_mode(False):
        byte = torch.arange(256, device=device)
        return nf4_code(device)[torch.stack([byte >> 4, byte & 15], 1)]


def _midpoints(device: torch.device) -> Tensor:
    code = nf4_code(device)
    return (code[:-1] + code[1:]) / 2  # [15], in float32 as bitsandbytes does


def _advance(nested: NestedAbsmax | None, blocks: int) -> NestedAbsmax | None:
    if nested is None:
        return None
    first, rest = divmod(nested.first_block + blocks, nested.blocksize)
    return NestedAbsmax(nested.absmax[first:], nested.code, nested.offset[first:], nested.blocksize, rest)


def _check_out(weight: Nf4Weight, out: Tensor) -> None:
    if tuple(out.shape) != weight.shape or not out.is_floating_point():
        raise ValueError(f"out: floating [{weight.shape[0]}, {weight.shape[1]}], got {out.dtype} {[*out.shape]}")
    if out.device != weight.device:
        raise ValueError(f"out is on {out.device}, the weight on {weight.device}")
    if out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"out: unit stride along its columns expected, got strides {out.stride()}")
