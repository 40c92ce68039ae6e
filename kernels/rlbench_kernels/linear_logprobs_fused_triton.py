"""`linear_logprobs` on Hopper GPUs in bfloat16: one kernel computes a tile's logits and folds them, in registers.

The logits never reach memory. For each row the kernel sums e = exp(score - reference) and e (score - reference), the
target left out, and writes e in bfloat16; a library matmul adds e W to a float32 accumulator [n, D].
The reference is the target's score, which for a token that was sampled lies near the highest one. In a row where a
score is more than 60 above it the reference moves there, and the launch is made a second time: programs of a launch
without such a row find nothing to do.

Shapes: N rows, n rows of one chunk, D hidden, V vocabulary, S columns of one section of the vocabulary.
Source: online softmax, Milakov and Gimelshein, arXiv 1805.02867.
"""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rlbench_kernels.launch import cdiv
from rlbench_kernels.linear_logprobs_head import Head
from rlbench_kernels.linear_logprobs_triton import TritonSoftmax, multiply

_ROWS = 2048  # of one chunk
_BLOCK_M, _BLOCK_N, _BLOCK_K = 128, 256, 64
_LAUNCH = {"num_warps": 8, "num_stages": 3}
_TARGET_ROWS = 64
_FOLD_ROWS, _FOLD_TILES = 16, 64
_LIMIT = tl.constexpr(60.0)  # exp(60) V stays far below float32's and bfloat16's largest number
_LOWEST = tl.constexpr(-1e30)
_FLOOR = tl.constexpr(-1e4)  # exp2 of it is 0, and 0 times it is no nan
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _to_scores(z, bias, column, inverse, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Scores of logits z without bias, and softcap slopes; `bias` and `inverse` broadcast against z."""
    slope = 1.0
    if HAS_BIAS:
        z += tl.load(bias + column).to(tl.float32)
    if HAS_CAP:
        tanh = 2.0 / (1.0 + tl.exp(-2.0 * z / softcap)) - 1.0
        slope = 1.0 - tanh * tanh
        z = softcap * tanh
    return z * inverse, slope


@triton.jit(do_not_specialize=["rows"])
def _target_scores(
    hidden, weight, bias, targets, inverse_temperatures, state, flags, rows, softcap, D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """ROWS rows: state [4, n] = (reference, 0, 0, target score); flags [n] = 0.

    The scores are the diagonal of a matmul: summed as `_score_tiles` sums them, so that what the matrix units round
    off cancels in the difference to other scores.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    target = tl.load(targets + row, mask=is_row, other=0)
    z = tl.zeros((ROWS, ROWS), tl.float32)
    for first in range(0, D, BLOCK_K):
        d = first + tl.arange(0, BLOCK_K)
        mask = is_row[:, None] & (d < D)[None, :]
        a = tl.load(hidden + row.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)
        b = tl.load(weight + target[:, None] * D + d[None, :], mask=mask, other=0.0)
        z = tl.dot(a, b.T, z, input_precision="ieee")
    is_own = tl.arange(0, ROWS)[:, None] == tl.arange(0, ROWS)[None, :]
    logit = tl.sum(tl.where(is_own, z, 0.0), 1)
    score, _ = _to_scores(
        logit, bias, target, tl.load(inverse_temperatures + row, mask=is_row, other=1.0), softcap, HAS_BIAS, HAS_CAP
    )
    tl.store(state + row, tl.where(score < _LOWEST, _LOWEST, score), mask=is_row)
    tl.store(state + rows + row, 0.0, mask=is_row)
    tl.store(state + 2 * rows + row, 0.0, mask=is_row)
    tl.store(state + 3 * rows + row, score, mask=is_row)
    tl.store(flags + row, 0, mask=is_row)


@triton.jit
def _fold_scores(
    z, values, bias, row0, column0, first, width, target, inverse, reference, threshold, softcap, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SUPPORT: tl.constexpr,
):  # fmt: skip
    """Write e of a block; for each row its highest gap, sum e and sum e gap."""
    column = column0 + tl.arange(0, BLOCK)
    safe = tl.minimum(column, width - 1)
    scores, slope = _to_scores(z, bias, (first + safe)[None, :], inverse[:, None], softcap, HAS_BIAS, HAS_CAP)
    is_out = (column[None, :] == target[:, None]) | (column >= width)[None, :]
    if HAS_SUPPORT:
        is_out = is_out | (scores < threshold[:, None])
    gap = (scores - reference[:, None]) * _LOG2_E
    gap = tl.where(is_out, _FLOOR, tl.maximum(gap, _FLOOR, propagate_nan=tl.PropagateNan.ALL))
    e = tl.exp2(gap)
    values.store([row0, column0], (e * slope).to(values.dtype))
    return tl.max(gap, 1), tl.sum(e, 1), tl.sum(e * gap, 1)


@triton.jit(do_not_specialize=["rows", "first", "width", "is_redo"])
def _score_tiles(
    hidden, weight, values, bias, targets, inverse_temperatures, support, state, flags, partial, rows, first, width,
    softcap, is_redo, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr, FLAG_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SUPPORT: tl.constexpr,
):  # fmt: skip
    """Columns first : first + width of all rows; partial [3, tiles, n] = (highest gap, sum e, sum e gap), base 2."""
    row_blocks = tl.cdiv(rows, BLOCK_M)
    num_tiles = row_blocks * tl.cdiv(width, BLOCK_N)
    num_tiles = tl.where(is_redo == 1, tl.where(_any(flags, rows, FLAG_BLOCK), num_tiles, 0), num_tiles)
    for tile in tl.range(tl.program_id(0), num_tiles, PROGRAMS, flatten=True):
        block_m = tile % row_blocks
        block_n = tile // row_blocks
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            a = hidden.load([block_m * BLOCK_M, k])
            b = weight.load([first + block_n * BLOCK_N, k])
            z = tl.dot(a, b.T, z, input_precision="ieee")
        row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        is_row = row < rows
        inverse = tl.load(inverse_temperatures + row, mask=is_row, other=0.0)
        reference = tl.load(state + row, mask=is_row, other=0.0)
        target = tl.load(targets + row, mask=is_row, other=-1) - first
        threshold = reference
        if HAS_SUPPORT:
            threshold = tl.load(support + row, mask=is_row, other=0.0)
        # two halves: fewer registers at a time
        left, right = tl.reshape(z, (BLOCK_M, 2, BLOCK_N // 2)).permute(0, 2, 1).split()
        highest, total, weighted = _fold_scores(
            left, values, bias, block_m * BLOCK_M, block_n * BLOCK_N, first, width, target, inverse, reference,
            threshold, softcap, BLOCK_N // 2, HAS_BIAS, HAS_CAP, HAS_SUPPORT,
        )  # fmt: skip
        highest_2, total_2, weighted_2 = _fold_scores(
            right, values, bias, block_m * BLOCK_M, block_n * BLOCK_N + BLOCK_N // 2, first, width, target, inverse,
            reference, threshold, softcap, BLOCK_N // 2, HAS_BIAS, HAS_CAP, HAS_SUPPORT,
        )  # fmt: skip
        place = partial + block_n.to(tl.int64) * rows + row
        plane = tl.cdiv(width, BLOCK_N).to(tl.int64) * rows
        tl.store(place, tl.maximum(highest, highest_2, propagate_nan=tl.PropagateNan.ALL), mask=is_row)
        tl.store(place + plane, total + total_2, mask=is_row)
        tl.store(place + 2 * plane, weighted + weighted_2, mask=is_row)


@triton.jit
def _any(flags, rows, BLOCK: tl.constexpr):
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        found |= tl.load(flags + row, mask=row < rows, other=0)
    return tl.max(found, 0) > 0


@triton.jit(do_not_specialize=["tiles", "is_redo"])
def _fold_partials(
    partial, state, flags, accumulator, rows, tiles, is_redo, D: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, BLOCK_D: tl.constexpr, HAS_ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """ROWS rows: add a section's sums to state, or move the reference of a row whose scores are too far above it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    plane = tiles.to(tl.int64) * rows
    highest = tl.full((ROWS,), _FLOOR, tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    products = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        mask = (tile < tiles)[:, None] & is_row[None, :]
        place = partial + tile.to(tl.int64)[:, None] * rows + row[None, :]
        highest = tl.maximum(highest, tl.max(tl.load(place, mask=mask, other=_FLOOR), 0))
        sums += tl.sum(tl.load(place + plane, mask=mask, other=0.0), 0)
        products += tl.sum(tl.load(place + 2 * plane, mask=mask, other=0.0), 0)
    flag = tl.load(flags + row, mask=is_row, other=0)
    old = tl.load(state + row, mask=is_row, other=0.0)
    total = tl.load(state + rows + row, mask=is_row, other=0.0)
    weighted = tl.load(state + 2 * rows + row, mask=is_row, other=0.0)
    is_moved = tl.where(is_redo == 0, highest, _FLOOR) * _LN_2 > _LIMIT
    is_added = tl.where(is_redo == 0, 1 - is_moved.to(tl.int32), flag) == 1
    new = tl.where(is_moved, old + highest * _LN_2, old)
    factor = tl.exp(old - new)
    weighted = tl.where(is_moved, factor * (weighted + (old - new) * total), weighted)
    total = tl.where(is_moved, factor * total, total)
    tl.store(state + row, new, mask=is_row)
    tl.store(state + rows + row, tl.where(is_added, total + sums, total), mask=is_row)
    tl.store(state + 2 * rows + row, tl.where(is_added, weighted + products * _LN_2, weighted), mask=is_row)
    tl.store(flags + row, is_moved.to(tl.int32), mask=is_row)
    if HAS_ACCUMULATOR:
        if tl.max(is_moved.to(tl.int32), 0) == 1:
            for first in range(0, D, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                place = accumulator + row.to(tl.int64)[:, None] * D + d[None, :]
                mask = (is_row & is_moved)[:, None] & (d < D)[None, :]
                tl.store(place, tl.load(place, mask=mask, other=0.0) * factor[:, None], mask=mask)


class FusedSoftmax(TritonSoftmax):
    """As `TritonSoftmax`, for bfloat16 on a Hopper GPU (and float32 under Triton's interpreter)."""

    def __init__(self, hidden: Tensor, head: Head) -> None:
        super().__init__(hidden, head, max_rows=_ROWS)
        num_programs = _num_programs(hidden.device)
        vocabulary, size = len(head.weight), self.max_rows
        # whole waves of programs: S is a multiple of their number
        width = num_programs * _BLOCK_N
        self._sections = [(s, min(s + width, vocabulary)) for s in range(0, vocabulary, width)]
        self._width = -(-min(width, vocabulary) // 8) * 8
        self._values: Tensor | None = None
        self._flags = torch.empty(size, dtype=torch.int32, device=hidden.device)
        num_tiles = cdiv(self._width, _BLOCK_N)
        self._partial = torch.empty(3 * num_tiles * size, dtype=torch.float32, device=hidden.device)
        self._weight = TensorDescriptor.from_tensor(head.weight, [_BLOCK_N, _BLOCK_K])
        self._programs = num_programs

    def _fold(self, with_gradient: bool) -> None:
        n, depth = self._hidden.shape
        head, accumulator = self.head, self.accumulator if with_gradient else None
        options: dict[str, Any] = {"HAS_BIAS": head.bias is not None, "HAS_CAP": head.softcap is not None}
        cap = head.softcap or 0.0
        _target_scores[(cdiv(n, _TARGET_ROWS),)](
            self._hidden, head.weight, head.bias, self._targets, self._inverse, self._state, self._flags, n, cap,
            D=depth, ROWS=_TARGET_ROWS, BLOCK_K=_BLOCK_K, num_warps=4, **options,
        )  # fmt: skip
        hidden = TensorDescriptor.from_tensor(self._hidden, [_BLOCK_M, _BLOCK_K])
        for section, (start, end) in enumerate(self._sections):
            tiles = cdiv(end - start, _BLOCK_N)
            values = self._section_values(section, with_gradient)
            for is_redo in (0, 1):
                _score_tiles[(min(self._programs, tiles * cdiv(n, _BLOCK_M)),)](
                    hidden, self._weight, TensorDescriptor.from_tensor(values, [_BLOCK_M, _BLOCK_N // 2]), head.bias,
                    self._targets, self._inverse, self._support, self._state, self._flags, self._partial, n, start,
                    end - start, cap, is_redo, D=depth, BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K,
                    PROGRAMS=self._programs, FLAG_BLOCK=1024, HAS_SUPPORT=self._support is not None, **options,
                    **_LAUNCH,
                )  # fmt: skip
                has_accumulator = accumulator is not None and start > 0
                _fold_partials[(cdiv(n, _FOLD_ROWS),)](
                    self._partial, self._state, self._flags, accumulator if has_accumulator else None, n, tiles,
                    is_redo, D=depth, ROWS=_FOLD_ROWS, TILES=_FOLD_TILES, BLOCK_D=256, HAS_ACCUMULATOR=has_accumulator,
                )  # fmt: skip
            self._end_section(section, values, accumulator)

    def _section_values(self, section: int, with_gradient: bool) -> Tensor:
        """Where e of a section goes, [n, S]; without gradient one row, beyond which nothing is written."""
        if not with_gradient:
            return self._hidden.new_empty((1, self._width))
        if self._values is None:
            self._values = self._hidden.new_empty((self.max_rows, self._width))
        return self._values[: len(self._hidden)]

    def _end_section(self, section: int, values: Tensor, accumulator: Tensor | None) -> None:
        """After its e [n, S] and its sums are complete."""
        start, end = self._sections[section]
        if accumulator is not None:
            weight, sums = self.head.weight[start:end], accumulator[: len(self._hidden)]
            multiply(values[:, : end - start], weight, sums, is_added=start > 0)


def can_fuse(hidden: Tensor, head: Head) -> bool:
    """Whether `FusedSoftmax` runs on these tensors: its tiles come through the tensor memory accelerator.

    Not with LoRA, whose product has to be in the tile before it is folded.
    """
    if hidden.dtype != torch.bfloat16 or head.lora is not None:
        return False
    if torch.cuda.get_device_capability(hidden.device)[0] != 9:
        return False
    return hidden.shape[1] % 8 == 0 and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (hidden, head.weight))


@cache
def _num_programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
