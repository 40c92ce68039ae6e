"""The sparse hidden gradient of `linear_logprobs` from the fused kernel's own values: no logits computed again.

e of a whole chunk, [n, V] in bfloat16, stays in memory until its gradient is written. Passes over it mark the columns
to keep (any row's e / total above eps), copy them side by side, and sum the others into tail masses and, for each
block and sign, the q of its shared vector. One matmul kernel takes the rows of W that each block kept by their
numbers, a library matmul makes q W of all blocks. Blocks that keep too much are e W, in a library matmul.
The host waits once a chunk, for the number of columns each block keeps; after a chunk whose blocks all keep too much
the later ones are dense at once. Every sum has one order: no atomics.

Shapes: n rows of one chunk, B its blocks, D hidden, V vocabulary, P columns of e: V rounded up, K columns kept.
"""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import rlbench_kernels.linear_logprobs_fused_triton as fused
from rlbench_kernels.launch import cdiv
from rlbench_kernels.linear_logprobs_head import Head
from rlbench_kernels.linear_logprobs_sparse import BlockCounts, SparseGradient
from rlbench_kernels.linear_logprobs_triton import multiply

_ROWS, _COLUMNS = 32, 64  # of one step over e; the columns divide the fused kernel's tile
_PASS = {"num_warps": 4}
_BLOCK_M, _BLOCK_N, _BLOCK_K = 128, 256, 64  # of the matmul with gathered rows
_LAUNCH = {"num_warps": 8, "num_stages": 5}
_BLOCK_D = 1024


@triton.jit(do_not_specialize=["rows"])
def _move_references(
    values, corrections, rows, stride, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Bring e of a section of `width` columns to the last reference of its rows: nothing to do but where it moved."""
    section = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    correction = tl.load(corrections + section * rows + row, mask=is_row, other=1.0)
    is_moved = is_row & (correction != 1.0)
    if tl.max(is_moved.to(tl.int32), 0) == 0:
        return
    first = section * width
    for start in range(first, tl.minimum(first + width, stride), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        place = values + row.to(tl.int64)[:, None] * stride + column[None, :]
        mask = is_moved[:, None] & (column < stride)[None, :]
        e = tl.load(place, mask=mask, other=0.0).to(tl.float32) * correction[:, None]
        tl.store(place, e.to(values.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _split_columns(
    values, thresholds, inverse_totals, shares, marks, sums, q, tails, rows, block_rows, stride, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of a block: marks [B, P] = 1 where e of any row is above its threshold, else 0; their sums [B, steps];
    of the others q [2 B, P] and each row's mass, tails [steps, n].
    """
    block = tl.program_id(1)
    step = tl.program_id(0)
    column = step * COLUMNS + tl.arange(0, COLUMNS)
    first = block * block_rows
    last = tl.minimum(first + block_rows, rows)
    found = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = row < last
        place = values + row.to(tl.int64)[:, None] * stride + column[None, :]
        e = tl.load(place, mask=is_row[:, None], other=0.0).to(tl.float32)
        threshold = tl.load(thresholds + row, mask=is_row, other=float("inf"))
        found |= (e > threshold[:, None]).to(tl.int32)
    mark = tl.max(found, 0)
    tl.store(marks + block.to(tl.int64) * stride + column, mark)
    tl.store(sums + block * tl.num_programs(0) + step, tl.sum(mark, 0))
    above = tl.zeros((ROWS, COLUMNS), tl.float32)
    below = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = row < last
        inverse_total = tl.load(inverse_totals + row, mask=is_row, other=0.0)
        share = tl.load(shares + row, mask=is_row, other=0.0)
        place = values + row.to(tl.int64)[:, None] * stride + column[None, :]
        e = tl.load(place, mask=is_row[:, None], other=0.0).to(tl.float32)
        is_rest = (inverse_total > 0.0)[:, None] & (mark == 0)[None, :]  # rows without weight may be nan
        rest = tl.where(is_rest, e, 0.0) * inverse_total[:, None]
        tl.store(tails + step.to(tl.int64) * rows + row, tl.sum(rest, 1), mask=is_row)
        above += rest * tl.maximum(share, 0.0)[:, None]
        below += rest * tl.maximum(-share, 0.0)[:, None]
    place = q + 2 * block.to(tl.int64) * stride + column
    tl.store(place, tl.sum(above, 0).to(q.dtype.element_ty))
    tl.store(place + stride, tl.sum(below, 0).to(q.dtype.element_ty))


@triton.jit
def _list_columns(marks, ends, counts, columns, stride, kept_stride, limit, COLUMNS: tl.constexpr):
    """columns [B, K]: those marked, in their order, of blocks that keep at most `limit`.

    ends [B, steps] counts the marks of these COLUMNS and of those before, counts [B] all.
    """
    block = tl.program_id(1)
    step = tl.program_id(0)
    if tl.load(counts + block) > limit:
        return
    column = step * COLUMNS + tl.arange(0, COLUMNS)
    mark = tl.load(marks + block.to(tl.int64) * stride + column).to(tl.int32)
    end = tl.load(ends + block * tl.num_programs(0) + step)
    position = end - tl.sum(mark, 0) + tl.cumsum(mark, 0) - 1
    tl.store(columns + block.to(tl.int64) * kept_stride + position, column, mask=mark != 0)


@triton.jit(do_not_specialize=["rows"])
def _copy_kept(
    values, columns, counts, inverse_totals, kept, rows, block_rows, stride, kept_stride, limit, row_tiles,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """kept [n, K] = e of the listed columns side by side; 0 beyond their number and in rows without weight."""
    block = tl.program_id(0) // row_tiles
    count = tl.load(counts + block)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    if (count > limit) | (tl.program_id(1) * BLOCK_K >= count):
        return
    row = block * block_rows + (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    is_row = row < tl.minimum((block + 1) * block_rows, rows)
    column = tl.load(columns + block.to(tl.int64) * kept_stride + k, mask=k < count, other=0)
    has_weight = tl.load(inverse_totals + row, mask=is_row, other=0.0) > 0.0
    mask = (is_row & has_weight)[:, None] & (k < count)[None, :]
    e = tl.load(values + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)
    tl.store(kept + row.to(tl.int64)[:, None] * kept_stride + k[None, :], e, mask=is_row[:, None])


@triton.jit(do_not_specialize=["rows"])
def _multiply_gathered(
    kept, columns, weight, counts, accumulator, rows, block_rows, kept_stride, limit, row_tiles, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """accumulator [n, D] = kept [n, K] W[columns] for the blocks that keep at most `limit`.

    `row_tiles` a block. Programs side by side multiply the same part of D: their blocks share rows of W.
    """
    block = tl.program_id(0) // row_tiles
    count = tl.load(counts + block)
    if count > limit:
        return
    row = block * block_rows + (tl.program_id(0) % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < tl.minimum((block + 1) * block_rows, rows)
    d = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    kept_place = kept + row.to(tl.int64)[:, None] * kept_stride + k[None, :]
    column_place = columns + block.to(tl.int64) * kept_stride + k
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, count, BLOCK_K):  # beyond the count e is 0 and the column is 0
        column = tl.load(column_place + start).to(tl.int64)
        a = tl.load(kept_place + start, mask=is_row[:, None], other=0.0)
        b = tl.load(weight + column[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
        z = tl.dot(a, b, z, input_precision="ieee")
    place = accumulator + row.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(place, z, mask=is_row[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _combine(
    out, accumulator, vectors, weight, targets, terms, owners, rows, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):  # fmt: skip
    """Row program: out = factor (target_weight W[target] - accumulator / total - tail vectors[owner]); 0 where
    factor is 0. terms [4, n] = (factor, target_weight, 1 / total, tail).
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    factor, target_weight = tl.load(terms + row), tl.load(terms + rows + row)
    target = tl.load(weight + tl.load(targets + row) * D + d, mask=d < D, other=0.0).to(tl.float32)
    mean = tl.load(accumulator + row * D + d, mask=d < D, other=0.0) * tl.load(terms + 2 * rows + row)
    if HAS_TAIL:
        vector = tl.load(vectors + tl.load(owners + row) * D + d, mask=d < D, other=0.0)
        mean += vector * tl.load(terms + 3 * rows + row)
    value = factor * (target_weight * target - mean)
    tl.store(out + row * D + d, tl.where(factor == 0.0, 0.0, value).to(out.dtype.element_ty), mask=d < D)


class _Split(NamedTuple):
    """What a pass over e found."""

    marks: Tensor  # uint8 [B, P]: 1 in the columns to keep
    ends: Tensor  # int32 [B, steps]: how many there are up to the end of each step
    counts: Tensor  # int32 [B]: how many there are
    q: Tensor  # [2 B, P], of the other columns, by the sign of the rows' shares
    tails: Tensor  # float32 [steps, n]: mass of each row in the other columns


class SparseFusedSoftmax(fused.FusedSoftmax):
    """As `FusedSoftmax`, with e of a whole chunk in memory, from which it writes the sparse gradient alone."""

    def __init__(self, hidden: Tensor, head: Head) -> None:
        super().__init__(hidden, head)
        assert fused._BLOCK_N % _COLUMNS == 0  # a section ends between two steps, and e of a step is written
        self._stride = cdiv(len(head.weight), _COLUMNS) * _COLUMNS
        self._e = hidden.new_empty((self.max_rows, self._stride))  # [n, P], 0 beyond V
        size = (len(self._sections), self.max_rows)
        self._references = torch.empty(size, dtype=torch.float32, device=hidden.device)  # of e, by section
        self._is_flat = False  # all blocks of a chunk kept too much: the later chunks are dense without a look at them

    def _section_values(self, section: int, with_gradient: bool) -> Tensor:
        assert not with_gradient
        start, end = self._sections[section]
        return self._e[: len(self._hidden), start : start + cdiv(end - start, _COLUMNS) * _COLUMNS]

    def _end_section(self, section: int, values: Tensor, accumulator: Tensor | None) -> None:
        self._references[section, : len(self._hidden)] = self._state[0]

    def write_sparse(self, options: SparseGradient, weights: Tensor, factors: Tensor, out: Tensor) -> BlockCounts:
        """As `SparseSoftmax.write_sparse`; once after a `forward`."""
        (n, depth), block_rows = out.shape, min(options.block_rows, fused._ROWS)
        reference, others, _, target_score = self._state
        totals = others + (target_score - reference).exp()
        target_weight = others / totals * self._target_slope(target_score)
        is_active = weights.isfinite() & (weights != 0) & target_weight.isfinite()  # [n]
        shares = torch.where(is_active, weights * self._inverse, 0.0)
        inverse_totals = torch.where(is_active, totals.reciprocal(), 0.0)
        self._to_last_reference(is_active)
        limit = int(options.max_kept_frac * len(self.head.weight))
        split, counts = None, [limit + 1] * cdiv(n, block_rows)
        tail_mass, coefficient, vectors, owners = torch.zeros_like(shares), shares, None, None
        if not self._is_flat:
            thresholds = torch.where(is_active, options.eps * totals, torch.inf)
            split = self._split(thresholds, inverse_totals, shares, block_rows)
            tail_mass = split.tails.sum(0) * (split.counts <= limit).repeat_interleave(block_rows)[:n]
            coefficient, owners = _tail_terms(shares, tail_mass, block_rows)
        terms = torch.stack([factors * self._inverse, target_weight, inverse_totals, coefficient])
        if split is not None:
            counts = split.counts.tolist()  # the host waits here
            self._is_flat = min(counts) > limit
        if split is not None and not self._is_flat:
            vectors = torch.empty((len(split.q), depth), dtype=torch.float32, device=out.device)
            multiply(split.q[:, : len(self.head.weight)], self.head.weight, vectors)
            most = max(count for count in counts if count <= limit)
            self._multiply_kept(split, inverse_totals, block_rows, limit, most)
        self._multiply_dense(counts, limit, block_rows)
        _combine[(n, cdiv(depth, _BLOCK_D))](
            out, self.accumulator, vectors, self.head.weight, self._targets, terms, owners, n, D=depth,
            BLOCK_D=_BLOCK_D, HAS_TAIL=vectors is not None,
        )  # fmt: skip
        kept = [1.0 if count > limit else count / len(self.head.weight) for count in counts]
        return BlockCounts(kept, sum(count > limit for count in counts), tail_mass, is_active)

    def _target_slope(self, target_score: Tensor) -> Tensor | float:
        """The softcap's slope [n] at the target."""
        if self.head.softcap is None:
            return 1.0
        return 1.0 - (target_score / (self._inverse * self.head.softcap)).square()

    def _to_last_reference(self, is_active: Tensor) -> None:
        """e of all sections relative to one reference a row, `_state[0]`."""
        n, num_sections = len(is_active), len(self._sections)
        if num_sections > 1:
            corrections = torch.where(is_active, (self._references[:, :n] - self._state[0]).exp(), 1.0)
            _move_references[(cdiv(n, _ROWS), num_sections)](
                self._e, corrections, n, self._stride, self._sections[0][1], ROWS=_ROWS, COLUMNS=_COLUMNS, **_PASS
            )

    def _split(self, thresholds: Tensor, inverse_totals: Tensor, shares: Tensor, block_rows: int) -> _Split:
        """One pass over e."""
        n, num_blocks, num_steps = len(shares), cdiv(len(shares), block_rows), self._stride // _COLUMNS
        device = shares.device
        marks = torch.empty((num_blocks, self._stride), dtype=torch.uint8, device=device)
        sums = torch.empty((num_blocks, num_steps), dtype=torch.int32, device=device)
        q = torch.empty((2 * num_blocks, self._stride), dtype=self._e.dtype, device=device)
        tails = torch.empty((num_steps, n), dtype=torch.float32, device=device)
        _split_columns[(num_steps, num_blocks)](
            self._e, thresholds, inverse_totals, shares, marks, sums, q, tails, n, block_rows, self._stride,
            ROWS=_ROWS, COLUMNS=_COLUMNS, **_PASS,
        )  # fmt: skip
        ends = sums.cumsum(1, dtype=torch.int32)
        return _Split(marks, ends, ends[:, -1].contiguous(), q, tails)

    def _multiply_dense(self, counts: list[int], limit: int, block_rows: int) -> None:
        """The accumulator's rows of blocks that keep more than `limit`; neighbours in one matmul."""
        weight, n = self.head.weight, len(self._hidden)
        for is_dense, blocks in groupby(range(len(counts)), key=lambda block: counts[block] > limit):
            if is_dense:
                first, *others = blocks
                rows = slice(first * block_rows, min((first + len(others) + 1) * block_rows, n))
                multiply(self._e[rows, : len(weight)], weight, self.accumulator[rows])

    def _multiply_kept(
        self, split: _Split, inverse_totals: Tensor, block_rows: int, limit: int, most: int
    ) -> None:  # fmt: skip
        """The accumulator's rows of the blocks that keep at most `limit`: at most `most` columns each."""
        n, depth, num_blocks = len(inverse_totals), self._hidden.shape[1], len(split.marks)
        kept_stride = max(1, cdiv(most, _BLOCK_K)) * _BLOCK_K
        kept = self._e.new_empty((n, kept_stride))
        columns = torch.zeros((num_blocks, kept_stride), dtype=torch.int32, device=kept.device)
        _list_columns[(self._stride // _COLUMNS, num_blocks)](
            split.marks, split.ends, split.counts, columns, self._stride, kept_stride, limit, COLUMNS=_COLUMNS,
            num_warps=1,
        )  # fmt: skip
        row_tiles = cdiv(block_rows, _ROWS)
        _copy_kept[(num_blocks * row_tiles, kept_stride // _BLOCK_K)](
            self._e, columns, split.counts, inverse_totals, kept, n, block_rows, self._stride, kept_stride, limit,
            row_tiles, ROWS=_ROWS, BLOCK_K=_BLOCK_K, num_warps=4,
        )  # fmt: skip
        row_tiles = cdiv(block_rows, _BLOCK_M)
        _multiply_gathered[(num_blocks * row_tiles, cdiv(depth, _BLOCK_N))](
            kept, columns, self.head.weight, split.counts, self.accumulator, n, block_rows, kept_stride, limit,
            row_tiles, D=depth, BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, **_LAUNCH,
        )  # fmt: skip


def _tail_terms(shares: Tensor, tail_mass: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    """For each row tail_mass over the share-weighted tail mass of its block and sign [n], and its row of q [n]."""
    n = len(shares)
    masses = torch.stack([shares.clamp(min=0), (-shares).clamp(min=0)]) * tail_mass  # [2, n]
    padded = torch.nn.functional.pad(masses, (0, -n % block_rows))
    totals = padded.view(2, -1, block_rows).sum(2).T.reshape(-1)  # [2 B]
    owners = 2 * (torch.arange(n, device=shares.device) // block_rows) + (shares < 0)
    return tail_mass / torch.where(totals > 0, totals, 1.0)[owners], owners
