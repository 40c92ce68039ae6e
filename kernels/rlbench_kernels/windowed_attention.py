"""Packed attention with a sliding window, by one call of flash attention.

A completion sees at most the last window - 1 tokens of its prompt. Keys are gathered so: each prompt's own, and for
each completion the end of its prompt and its own; distances within a sequence of keys are then those of positions.

Shapes: T packed tokens, S gathered keys, Hq query heads, Hk key heads, d features of a head.
Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.1.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlbench_kernels import flash_attention_2


@dataclass(frozen=True, slots=True, eq=False)
class WindowedKeys:
    """The keys of each prompt and completion, as rows of the packed tokens.

    Example:
        >>> keys = WindowedKeys.from_groups([(3, [2, 1])], 2, torch.device("cpu"))
        >>> keys.rows.tolist(), keys.starts.tolist()
        ([0, 1, 2, 2, 3, 4, 2, 5], [0, 3, 6, 8])
    """

    rows: Tensor  # int64 [S]
    starts: Tensor  # int32 [prompts and completions + 1], bounds of each in `rows`
    longest: int

    @classmethod
    def from_groups(
        cls, groups: Sequence[tuple[int, Sequence[int]]], window: int, device: torch.device
    ) -> WindowedKeys:
        """
        Args:
            groups: (prompt length, completion lengths) of each group in packed order; empty completions have no keys.
            window: keys that a token sees, its own among them.
            device: of the tensors.
        """
        spans: list[list[range]] = []
        first = 0
        for prompt, completions in groups:
            end = first + prompt
            spans.append([range(first, end)])
            tail = range(max(first, end - window + 1), end)
            for length in filter(None, completions):
                first, end = end, end + length
                spans.append([tail, range(first, end)])
            first = end
        lengths = [sum(map(len, parts)) for parts in spans]
        rows = torch.cat([torch.arange(part.start, part.stop) for parts in spans for part in parts])
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(rows=rows.to(device), starts=starts.to(device), longest=max(lengths))


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, keys: WindowedKeys, *, scale: float, window: int
) -> Tensor:
    """softmax(scale q k^T) v over the keys within the window, on CUDA in 16 bits.

    Args:
        q: [T, Hq, d]. k, v: [T, Hk, d].
        starts: int32 [prompts and completions + 1], bounds of each in the packed row.
        longest: of them.
        keys: of the same window.
        scale: of the scores.
        window: as in `WindowedKeys`.

    Returns:
        [T, Hq, d], differentiable to q, k and v. Gradients of a prompt's keys are summed in float32.
    """
    return _WindowedAttention.apply(q, k, v, starts, longest, keys, scale, window)  # pyright: ignore[reportReturnType]


class _WindowedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, keys: WindowedKeys, scale: float,
        window: int,
    ) -> Tensor:  # fmt: skip
        bounds = starts, keys.starts, longest, keys.longest
        options = {"is_causal": True, "scale": scale, "window": window}
        out, lse, *state = flash_attention_2.forward(q, k[keys.rows], v[keys.rows], *bounds, **options)
        ctx.save_for_backward(q, k, v, out, lse, *state)
        ctx.keys, ctx.bounds, ctx.options = keys, bounds, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse, *state = ctx.saved_tensors
        rows, (q_starts, k_starts, max_q, max_k) = ctx.keys.rows, ctx.bounds
        grad_q, *grads = flash_attention_2.gradients(
            grad.contiguous(), q, k[rows], v[rows], out, lse, q_starts, k_starts, max_q, max_k, state, **ctx.options
        )
        sums = [_sum_rows(part, rows, like) for part, like in zip(grads, (k, v), strict=True)]
        return grad_q, *sums, None, None, None, None, None


def _sum_rows(parts: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """[S, Hk, d] -> [T, Hk, d]: sums of the parts of each row."""
    total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    return total.index_add_(0, rows, parts.float()).to(like.dtype)
