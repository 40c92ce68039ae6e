"""Packed attention with a sliding window and capped scores, or neither, by torch's FlexAttention.

Which tokens a token sees is decided by positions and by what it belongs to, not by its place in the packed row. A first
call compiles; blocks of the row in which no token sees another are left out.

Shapes: T packed tokens, Hq query heads, Hk key heads, d features of a head.
Source: Dong et al. 2024, arXiv:2412.05496.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from rlbench_kernels.masked_attention import cap_scores


def block_mask(groups: Sequence[tuple[int, Sequence[int]]], window: int | None, device: torch.device) -> BlockMask:
    """Of the packed row of `groups`, (prompt length, completion lengths) of each in packed order."""
    sequence, owner, shown, position = (column.to(device) for column in row_columns(groups))

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = position[query] - position[key]
        is_near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return is_near & ((sequence[query] == sequence[key]) | (owner[query] == shown[key]))

    size = len(sequence)
    return create_block_mask(is_visible, None, None, size, size, device=str(device), _compile=device.type == "cuda")


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
    """Compiled on a GPU; elsewhere as it is, with the scores in memory: for tests."""
    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention
