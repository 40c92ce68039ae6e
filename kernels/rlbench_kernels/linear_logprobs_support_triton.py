"""`support_thresholds` on CUDA: a program a row, which searches top_p's threshold in the row's scores without a sort.

The share of scores above a cut falls as the cut rises. Each pass over the row, which stays in the L2 cache, tries
eight cuts and keeps the eighth of the range where the share passes top_p: 11 passes bring the range from 40 nats to
5e-9.

Shapes: n rows, V vocabulary.
"""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
_RANGE = tl.constexpr(40.0)  # exp(-40) V is nothing beside the highest token
_CUTS = tl.constexpr(8)
_PASSES = tl.constexpr(11)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _search(
    scores, belows, highests, thresholds, stride, vocabulary, top_p, BLOCK: tl.constexpr, HAS_TOP_P: tl.constexpr
):
    """Row program: thresholds[row], halfway between the lowest score inside and the highest outside."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    below = tl.load(belows + row)
    highest = tl.load(highests + row)
    if HAS_TOP_P:
        total = _mass_above(scores, below, highest, vocabulary, BLOCK)
        low = tl.maximum(below, highest - _RANGE)
        high = highest
        for _ in range(_PASSES):
            cuts = low + (high - low) / _CUTS * tl.arange(0, _CUTS)
            is_enough = _mass_above_cuts(scores, cuts, highest, vocabulary, BLOCK) >= top_p * total
            high = tl.min(tl.where(is_enough, high, cuts), 0)
            low = tl.max(tl.where(is_enough, cuts, low), 0)
        below = low
    lowest = tl.full((BLOCK,), _INF, tl.float32)
    highest_outside = tl.full((BLOCK,), -_INF, tl.float32)
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        s = tl.load(scores + column, mask=column < vocabulary, other=-_INF)
        lowest = tl.minimum(lowest, tl.where(s > below, s, _INF))
        highest_outside = tl.maximum(highest_outside, tl.where(s > below, -_INF, s))
    low = tl.min(lowest, 0)
    high = tl.max(highest_outside, 0)
    middle = 0.5 * low + 0.5 * high
    threshold = tl.where(middle > high, middle, low)
    tl.store(thresholds + row, tl.where(high == -_INF, high, threshold))


@triton.jit
def _mass_above(scores, cut, highest, vocabulary, BLOCK: tl.constexpr):
    """Sum of exp(s - highest) over scores above the cut."""
    mass = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        s = tl.load(scores + column, mask=column < vocabulary, other=-_INF)
        mass += tl.where(s > cut, tl.exp(s - highest), 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _mass_above_cuts(scores, cuts, highest, vocabulary, BLOCK: tl.constexpr):
    """`_mass_above` for each of the cuts."""
    mass = tl.zeros((_CUTS, BLOCK), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        s = tl.load(scores + column, mask=column < vocabulary, other=-_INF)
        mass += tl.where(s[None, :] > cuts[:, None], tl.exp(s - highest)[None, :], 0.0)
    return tl.sum(mass, 1)


def triton_thresholds(scores: Tensor, below: Tensor, top_p: float) -> Tensor:
    """float32 [n] of scores float32 [n, V], of which those not above `below` [n] are out already. No host wait."""
    thresholds = torch.empty_like(below)
    _search[(len(scores),)](
        scores, below, scores.amax(-1), thresholds, scores.stride(0), scores.shape[1], top_p, BLOCK=_BLOCK,
        HAS_TOP_P=top_p < 1, num_warps=8,
    )  # fmt: skip
    return thresholds
