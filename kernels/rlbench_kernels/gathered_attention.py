"""Packed attention by one call of flash attention over gathered keys.

Each prompt has its own keys, each completion those of its prompt (with a sliding window their end) and its own, side
by side. Distances within a sequence of keys are those of positions, and a causal mask by the end is the whole mask.

Shapes: T packed tokens, S gathered keys, Hq query heads, Hk key heads, d features of a head.
Source: the mask of a window, Beltagy et al. 2020, arXiv:2004.05150, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlbench_kernels.launch import use_triton


@dataclass(frozen=True, slots=True, eq=False)
class GatheredKeys:
    """The keys of each prompt and completion, as rows of the packed tokens.

    Example:
        >>> keys = GatheredKeys.from_groups([(3, [2, 1])], 2, torch.device("cpu"))
        >>> keys.rows.tolist(), keys.starts.tolist()
        ([0, 1, 2, 2, 3, 4, 2, 5], [0, 3, 6, 8])
        >>> keys.copies.tolist(), keys.copy_starts.tolist()
        ([0, 1, 2, 3, 6, 4, 5, 7], [0, 1, 2, 5, 6, 7, 8])
    """

    rows: Tensor  # int32 [S]
    starts: Tensor  # int32 [prompts and completions + 1], bounds of each in `rows`
    copies: Tensor  # int32 [S], the places in `rows` of each packed row, row after row
    copy_starts: Tensor  # int32 [T + 1], bounds of each packed row in `copies`
    longest: int

    @classmethod
    def from_groups(
        cls, groups: Sequence[tuple[int, Sequence[int]]], window: int | None, device: torch.device
    ) -> GatheredKeys:
        """
        Args:
            groups: (prompt length, completion lengths) of each group in packed order; empty completions have no keys.
            window: keys that a token sees, its own among them; None: all before it.
            device: of the tensors.
        """
        rows: list[Tensor] = []
        copies: list[Tensor] = []
        lengths: list[int] = []
        counts: list[tuple[int, int]] = []  # (copies, of so many packed rows)
        first = place = 0  # packed row and gathered key where the next group begins
        for prompt, completions in groups:
            tail = prompt if window is None else min(prompt, window - 1)
            completions = [n for n in completions if n]
            sizes = [prompt, *(tail + n for n in completions)]
            *begins, end = accumulate(sizes, initial=place)  # of the prompt's keys and each completion's
            of_prompt, own = torch.arange(first, first + prompt), first + prompt + torch.arange(sum(completions))
            rows.append(of_prompt)
            for part in own.split(completions):
                rows += [of_prompt[prompt - tail :], part]
            tails = torch.tensor([place + prompt - tail, *begins[1:]]) + torch.arange(tail)[:, None]
            copies += [torch.arange(place, place + prompt - tail), tails.flatten()]
            copies += [torch.arange(n) + begin + tail for n, begin in zip(completions, begins[1:], strict=True)]
            counts += [(1, prompt - tail), (1 + len(completions), tail), (1, len(own))]
            lengths += sizes
            first, place = first + prompt + len(own), end
        repeats, times = torch.tensor(counts).unbind(1)
        starts = torch.tensor([0, *accumulate(lengths)])
        copy_starts = torch.cat([starts.new_zeros(1), repeats.repeat_interleave(times).cumsum(0)])
        tensors = [x.int().to(device) for x in (torch.cat(rows), starts, torch.cat(copies), copy_starts)]
        return cls(tensors[0], tensors[1], tensors[2], tensors[3], longest=max(lengths))


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, keys: GatheredKeys, flash: ModuleType, *,
    scale: float, window: int | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T) v over the keys within the window, on CUDA in 16 bits.

    Args:
        q: [T, Hq, d]. k, v: [T, Hk, d].
        starts: int32 [prompts and completions + 1], bounds of each in the packed row.
        longest: of them.
        keys: of the same window.
        flash: `flash_attention_2` or, without a window, `flash_attention_4`.
        scale: of the scores.
        window: as in `GatheredKeys`.

    Returns:
        [T, Hq, d], differentiable to q, k and v. Gradients of a prompt's keys are summed in float32, in the order of
        its completions.
    """
    options = {"is_causal": True, "scale": scale} | ({} if window is None else {"window": window})
    return _GatheredAttention.apply(q, k, v, starts, longest, keys, flash, options)  # pyright: ignore[reportReturnType]


class _GatheredAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, keys: GatheredKeys,
        flash: ModuleType, options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        bounds = starts, keys.starts, longest, keys.longest
        out, lse, *state = flash.forward(q, *gather_rows(k, v, keys.rows), *bounds, **options)
        ctx.save_for_backward(q, k, v, out, lse, *state)
        ctx.keys, ctx.bounds, ctx.flash, ctx.options = keys, bounds, flash, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse, *state = ctx.saved_tensors
        gathered = gather_rows(k, v, ctx.keys.rows)
        grad_q, grad_k, grad_v = ctx.flash.gradients(
            grad.contiguous(), q, *gathered, out, lse, *ctx.bounds, state, **ctx.options
        )
        del gathered
        return grad_q, *sum_copies(grad_k, grad_v, ctx.keys), None, None, None, None, None


def gather_rows(k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """[T, Hk, d] -> [S, Hk, d], both."""
    if use_triton(k.device):
        from rlbench_kernels.gathered_attention_triton import launch_gather

        return launch_gather(k, v, rows)
    return k[rows], v[rows]


def sum_copies(k_parts: Tensor, v_parts: Tensor, keys: GatheredKeys) -> tuple[Tensor, Tensor]:
    """[S, Hk, d] -> [T, Hk, d], both: float32 sums over the copies of each row, in order, rounded once."""
    if use_triton(k_parts.device):
        from rlbench_kernels.gathered_attention_triton import launch_sums

        return launch_sums(k_parts, v_parts, keys.copies, keys.copy_starts)
    shape = len(keys.copy_starts) - 1, *k_parts.shape[1:]
    totals = [torch.zeros(shape, device=k_parts.device).index_add_(0, keys.rows, x.float()) for x in (k_parts, v_parts)]
    return totals[0].to(k_parts.dtype), totals[1].to(v_parts.dtype)
