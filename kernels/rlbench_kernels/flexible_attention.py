"""Packed attention with a sliding window and capped scores, or neither, by torch's FlexAttention.

Which tokens a token sees is decided by positions and by what it belongs to, not by its place in the packed row. First
calls compile; blocks of the row in which no token sees another are left out.

Shapes: T packed tokens, Hq query heads, Hk key heads, d features of a head.
Source: Dong et al. 2024, arXiv:2412.05496.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rlbench_kernels.masked_attention import cap_scores

_BLOCK = 128
_STRIP = 8 * _BLOCK
# a cap that is no constant does not compile; beyond the limit, 8 by default, the scores of all pairs would be in memory
_COMPILATION = {"specialize_float": True, "recompile_limit": 64}


def block_mask(groups: Sequence[tuple[int, Sequence[int]]], window: int | None, device: torch.device) -> BlockMask:
    """Of the packed row of `groups`, (prompt length, completion lengths) of each in packed order."""
    sequence, owner, shown, position = (column.to(device) for column in row_columns(groups))

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = position[query] - position[key]
        is_near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return is_near & ((sequence[query] == sequence[key]) | (owner[query] == shown[key]))

    some, every = _blocks(is_visible, len(sequence), device)
    return BlockMask.from_kv_blocks(
        *_lists(some & ~every),
        *_lists(every),
        BLOCK_SIZE=_BLOCK,
        mask_mod=is_visible,
        seq_lengths=(len(sequence), len(sequence)),
    )


def _blocks(is_visible: Callable[..., Tensor], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """bool [n, n] for blocks of 128 queries and keys: whether some pair is visible, and whether every one is.

    A strip of queries at a time: all pairs of a long row would not fit.
    """
    rows, none = torch.arange(size, device=device), torch.zeros((), dtype=torch.int64, device=device)
    short = -size % _BLOCK
    counts = []
    for start in range(0, size, _STRIP):
        seen = is_visible(none, none, rows[start : start + _STRIP, None], rows[None])
        seen = F.pad(seen, (0, short, 0, -len(seen) % _BLOCK))
        counts.append(seen.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK)).sum((1, 3)))
    found = torch.cat(counts)
    return found > 0, found == _BLOCK**2


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [1, 1, n] and indices [1, 1, n, n], those that are True first: int32."""
    indices = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], indices.int()[None, None]


def row_columns(groups: Sequence[tuple[int, Sequence[int]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each packed token, int32 [T]: its prompt or completion, its group, the group that all see it (a prompt's; else
    -1), and its position.
    """
    spans = [
        (group, group if is_prompt else -1, 0 if is_prompt else prompt, length)
        for group, (prompt, completions) in enumerate(groups)
        for is_prompt, length in [(True, prompt), *((False, length) for length in completions)]
    ]
    owners, shown, firsts, lengths = torch.tensor(spans, dtype=torch.int32).unbind(1)
    starts = lengths.cumsum(0) - lengths
    sequences = torch.arange(len(spans), dtype=torch.int32).repeat_interleave(lengths)
    owners, shown, offsets = (column.repeat_interleave(lengths) for column in (owners, shown, firsts - starts))
    return sequences, owners, shown, (torch.arange(len(sequences)) + offsets).int()


def flexible_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, scale: float, softcap: float | None
) -> Tensor:
    """softmax(cap(scale q k^T)) v over the keys that `mask` leaves, cap(z) = softcap tanh(z / softcap).

    Args:
        q: [T, Hq, d]. k, v: [T, Hk, d].
        mask: from `block_mask`.
        scale: of the scores.
        softcap: > 0, or None.

    Returns:
        [T, Hq, d], differentiable to q, k and v.
    """
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    cap = None if softcap is None else _cap(softcap)
    with torch._dynamo.config.patch(_COMPILATION):
        out = _function(q.device.type)(*heads, score_mod=cap, block_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


@cache
def _cap(softcap: float) -> Callable[..., Tensor]:
    """One function a value: another object would be compiled anew."""

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap_scores(score, softcap)

    return cap


@cache
def _function(device_type: str) -> Callable[..., Any]:
    """Compiled on a GPU; elsewhere as it is, with the scores in memory: for tests.

    A second length compiles once more, for all lengths from then on; with and without gradient each, and for layers
    with and without a window.
    """
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention
