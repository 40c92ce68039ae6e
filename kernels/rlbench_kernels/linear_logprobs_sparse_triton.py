"""The sparse hidden gradient of `linear_logprobs` from the fused kernel's own values: no logits computed again.

e of a whole chunk, [n, V] in bfloat16, stays in memory until its gradient is written. Passes over it mark the columns
to keep (any row's e / total above eps), copy them side by side, and sum the others into tail masses and, for each
block and sign, the q of its shared vector. One matmul kernel takes the rows of W that each block kept by their
numbers, a library matmul makes q W of all blocks. Blocks that keep too much are e W, in a library matmul.
The host waits once a chunk, for the number of columns each block keeps. Every sum has one order: no atomics.

Shapes: n rows of one chunk, B its blocks, D hidden, V vocabulary, P columns of e: V rounded up, K columns kept.
"""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

import rlbench_kernels.linear_logprobs_fused_triton as fused
from rlbench_kernels.launch import cdiv
from rlbench_kernels.linear_logprobs_head import Head
from rlbench_kernels.linear_logprobs_sparse import BlockCounts, SparseGradient
from rlbench_kernels.linear_logprobs_triton import multiply

_ROWS, _COLUMNS = 32, 128  # of one step over e; the columns divide the fused kernel's tile
_PASS = {"num_warps": 8}
_STAGES = 3  # steps of `_split_columns` whose e is under way
_BLOCK_M, _BLOCK_N, _BLOCK_K = 128, 256, 64  # of the matmul with gathered rows
_LAUNCH = {"num_warps": 8, "num_stages": 5}
_BLOCK_D = 1024


@triton.jit(do_not_specialize=["rows"])
def _mark_columns(
    values, corrections, thresholds, marks, sums, rows, block_rows, stride, width, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of a block: marks [B, P] = 1 where e of any row is above its threshold, else 0; their sums [B, steps].

    e of rows whose reference moved after their section of `width` columns is brought to the last one, in place.
    """
    block = tl.program_id(1)
    column0 = tl.program_id(0) * COLUMNS
    column = column0 + tl.arange(0, COLUMNS)
    first = block * block_rows
    last = tl.minimum(first + block_rows, rows)
    found = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = row < last
        correction = tl.load(corrections + (column0 // width) * rows + row, mask=is_row, other=1.0)
        place = values + row.to(tl.int64)[:, None] * stride + column[None, :]
        e = tl.load(place, mask=is_row[:, None], other=0.0).to(tl.float32) * correction[:, None]
        tl.store(place, e.to(values.dtype.element_ty), mask=(is_row & (correction != 1.0))[:, None])
        threshold = tl.load(thresholds + row, mask=is_row, other=float("inf"))
        found |= (e > threshold[:, None]).to(tl.int32)
    mark = tl.max(found, 0)
    tl.store(marks + block.to(tl.int64) * stride + column, mark)
    tl.store(sums + block * tl.num_programs(0) + tl.program_id(0), tl.sum(mark, 0))


@triton.jit(do_not_specialize=["rows"])
def _split_columns(
    values, marks, ends, counts, inverse_totals, shares, kept, columns, q, tails, rows, block_rows, stride, kept_stride,
    limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """COLUMNS of a block that keeps at most `limit`: its kept e and their columns side by side; of the others q and
    each row's mass.

    ends [B, steps] counts the marks of these columns and of those before, counts [B] all; kept [n, K],
    columns [B, K], q [2 B, P], tails [steps, n].
    """
    block = tl.program_id(1)
    step = tl.program_id(0)
    column = step * COLUMNS + tl.arange(0, COLUMNS)
    if tl.load(counts + block) > limit:
        return
    mark = tl.load(marks + block.to(tl.int64) * stride + column).to(tl.int32)
    is_kept = mark != 0
    num_kept = tl.sum(mark, 0)
    position = tl.load(ends + block * tl.num_programs(0) + step) - num_kept + tl.cumsum(mark, 0) - 1
    tl.store(columns + block.to(tl.int64) * kept_stride + position, column, mask=is_kept)
    first = block * block_rows
    last = tl.minimum(first + block_rows, rows)
    above = tl.zeros((ROWS, COLUMNS), tl.float32)
    below = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        is_row = row < last
        inverse_total = tl.load(inverse_totals + row, mask=is_row, other=0.0)
        share = tl.load(shares + row, mask=is_row, other=0.0)
        place = values + row.to(tl.int64)[:, None] * stride + column[None, :]
        e = tl.load(place, mask=is_row[:, None], other=0.0)
        e = tl.where(inverse_total[:, None] > 0.0, e, 0.0).to(values.dtype.element_ty)  # rows without weight may be nan
        if num_kept > 0:
            copied = kept + row.to(tl.int64)[:, None] * kept_stride + position[None, :]
            tl.store(copied, e, mask=is_row[:, None] & is_kept[None, :])
        rest = tl.where(is_kept[None, :], 0.0, e.to(tl.float32)) * inverse_total[:, None]
        tl.store(tails + step.to(tl.int64) * rows + row, tl.sum(rest, 1), mask=is_row)
        above += rest * tl.maximum(share, 0.0)[:, None]
        below += rest * tl.maximum(-share, 0.0)[:, None]
    place = q + 2 * block.to(tl.int64) * stride + column
    tl.store(place, tl.sum(above, 0).to(q.dtype.element_ty))
    tl.store(place + stride, tl.sum(below, 0).to(q.dtype.element_ty))


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


class SparseFusedSoftmax(fused.FusedSoftmax):
    """As `FusedSoftmax`, with e of a whole chunk in memory, from which it writes the sparse gradient alone."""

    def __init__(self, hidden: Tensor, head: Head) -> None:
        super().__init__(hidden, head)
        assert fused._BLOCK_N % _COLUMNS == 0  # a section ends between two steps, and e of a step is written
        self._stride = cdiv(len(head.weight), _COLUMNS) * _COLUMNS
        self._e = hidden.new_empty((self.max_rows, self._stride))  # [n, P], 0 beyond V
        size = (len(self._sections), self.max_rows)
        self._references = torch.empty(size, dtype=torch.float32, device=hidden.device)  # of e, by section

    def _section_values(self, section: int, with_gradient: bool) -> Tensor:
        assert not with_gradient
        start, end = self._sections[section]
        return self._e[: len(self._hidden), start : start + cdiv(end - start, _COLUMNS) * _COLUMNS]

    def _end_section(self, section: int, values: Tensor, accumulator: Tensor | None) -> None:
        self._references[section, : len(self._hidden)] = self._state[0]

    def write_sparse(self, options: SparseGradient, weights: Tensor, factors: Tensor, out: Tensor) -> BlockCounts:
        """As `SparseSoftmax.write_sparse`; once after a `forward`."""
        n, block_rows = len(out), min(options.block_rows, fused._ROWS)
        reference, others, _, target_score = self._state
        totals = others + (target_score - reference).exp()
        target_weight = others / totals * self._target_slope(target_score)
        is_active = weights.isfinite() & (weights != 0) & target_weight.isfinite()  # [n]
        shares = torch.where(is_active, weights * self._inverse, 0.0)
        inverse_totals = torch.where(is_active, totals.reciprocal(), 0.0)
        thresholds = torch.where(is_active, options.eps * totals, torch.inf)
        marks, ends = self._mark(thresholds, is_active, block_rows)
        counts = ends[:, -1].tolist()  # the host waits here
        limit = int(options.max_kept_frac * len(self.head.weight))
        self._multiply_dense(counts, limit, block_rows)
        tail_mass, coefficient, vectors, owners = torch.zeros_like(shares), shares, None, None
        if min(counts) <= limit:
            kept_counts = [count for count in counts if count <= limit]
            q, tail_mass = self._multiply_kept(marks, ends, inverse_totals, shares, block_rows, limit, max(kept_counts))
            vectors = torch.empty((len(q), out.shape[1]), dtype=torch.float32, device=out.device)
            multiply(q, self.head.weight, vectors)
            coefficient, owners = _tail_terms(shares, tail_mass, block_rows)
        terms = torch.stack([factors * self._inverse, target_weight, inverse_totals, coefficient])
        _combine[(n, cdiv(out.shape[1], _BLOCK_D))](
            out, self.accumulator, vectors, self.head.weight, self._targets, terms, owners, n, D=out.shape[1],
            BLOCK_D=_BLOCK_D, HAS_TAIL=vectors is not None,
        )  # fmt: skip
        kept = [1.0 if count > limit else count / len(self.head.weight) for count in counts]
        return BlockCounts(kept, sum(count > limit for count in counts), tail_mass, is_active)

    def _target_slope(self, target_score: Tensor) -> Tensor | float:
        """The softcap's slope [n] at the target."""
        if self.head.softcap is None:
            return 1.0
        return 1.0 - (target_score / (self._inverse * self.head.softcap)).square()

    def _mark(self, thresholds: Tensor, is_active: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
        """Marks [B, P] of the columns to keep, and how many there are up to the end of each step, int32 [B, steps]."""
        n, num_blocks = len(thresholds), cdiv(len(thresholds), block_rows)
        corrections = torch.where(is_active, (self._references[:, :n] - self._state[0]).exp(), 1.0)  # [sections, n]
        marks = torch.empty((num_blocks, self._stride), dtype=torch.uint8, device=thresholds.device)
        sums = torch.empty((num_blocks, self._stride // _COLUMNS), dtype=torch.int32, device=thresholds.device)
        width = self._sections[0][1] if len(self._sections) > 1 else self._stride
        _mark_columns[(self._stride // _COLUMNS, num_blocks)](
            self._e, corrections, thresholds, marks, sums, n, block_rows, self._stride, width, ROWS=_ROWS,
            COLUMNS=_COLUMNS, **_PASS,
        )  # fmt: skip
        return marks, sums.cumsum(1, dtype=torch.int32)

    def _multiply_dense(self, counts: list[int], limit: int, block_rows: int) -> None:
        """The accumulator's rows of blocks that keep more than `limit`; neighbours in one matmul."""
        weight, n = self.head.weight, len(self._hidden)
        for is_dense, blocks in groupby(range(len(counts)), key=lambda block: counts[block] > limit):
            if is_dense:
                first, *others = blocks
                rows = slice(first * block_rows, min((first + len(others) + 1) * block_rows, n))
                multiply(self._e[rows, : len(weight)], weight, self.accumulator[rows])

    def _multiply_kept(
        self, marks: Tensor, ends: Tensor, inverse_totals: Tensor, shares: Tensor, block_rows: int, limit: int,
        most: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The accumulator's rows of the other blocks, of at most `most` columns; q [2 B, V] and tail masses [n]."""
        n, depth, num_blocks = len(shares), self._hidden.shape[1], len(marks)
        counts = ends[:, -1].contiguous()
        stride, num_steps, device = self._stride, self._stride // _COLUMNS, shares.device
        kept_stride = max(1, cdiv(most, _BLOCK_K)) * _BLOCK_K
        kept = torch.zeros((n, kept_stride), dtype=self._e.dtype, device=device)
        columns = torch.zeros((num_blocks, kept_stride), dtype=torch.int32, device=device)
        q = torch.zeros((2 * num_blocks, stride), dtype=self._e.dtype, device=device)
        tails = torch.zeros((num_steps, n), dtype=torch.float32, device=device)
        _split_columns[(num_steps, num_blocks)](
            self._e, marks, ends, counts, inverse_totals, shares, kept, columns, q, tails, n, block_rows, stride,
            kept_stride, limit, ROWS=_ROWS, COLUMNS=_COLUMNS, STAGES=_STAGES, **_PASS,
        )  # fmt: skip
        row_tiles = cdiv(block_rows, _BLOCK_M)
        _multiply_gathered[(num_blocks * row_tiles, cdiv(depth, _BLOCK_N))](
            kept, columns, self.head.weight, counts, self.accumulator, n, block_rows, kept_stride, limit, row_tiles,
            D=depth, BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, **_LAUNCH,
        )  # fmt: skip
        return q[:, : len(self.head.weight)], tails.sum(0)


def _tail_terms(shares: Tensor, tail_mass: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    """For each row tail_mass over the share-weighted tail mass of its block and sign [n], and its row of q [n]."""
    n = len(shares)
    masses = torch.stack([shares.clamp(min=0), (-shares).clamp(min=0)]) * tail_mass  # [2, n]
    padded = torch.nn.functional.pad(masses, (0, -n % block_rows))
    totals = padded.view(2, -1, block_rows).sum(2).T.reshape(-1)  # [2 B]
    owners = 2 * (torch.arange(n, device=shares.device) // block_rows) + (shares < 0)
    return tail_mass / torch.where(totals > 0, totals, 1.0)[owners], owners
