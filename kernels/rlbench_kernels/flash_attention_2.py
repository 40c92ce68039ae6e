"""The calls of `packed_attention` and `gathered_attention` by torch's own flash attention, version 2."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, max_q: int, max_k: int, *, is_causal: bool,
    scale: float, window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out [T, Hq, d], lse float32 [Hq, T], and two tensors of random state that the backward op asks for.

    Args:
        q: [T, Hq, d], 16 bits; k, v: [S, Hk, d].
        q_starts, k_starts: int32 [B + 1], bounds of the B sequences.
        max_q, max_k: the longest of them.
        is_causal: masks by the end: the last query sees all keys.
        scale: of the scores.
        window: a causal query sees itself and the window - 1 keys before it; None: all before it.
    """
    out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, q_starts, k_starts, max_q, max_k, 0.0, is_causal, False, scale=scale, **_sides(window)
    )
    return out, lse, state, unused


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_starts: Tensor, k_starts: Tensor,
    max_q: int, max_k: int, state: Sequence[Tensor], *, is_causal: bool, scale: float, window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Those of q, k and v, given the gradient of `out` and the forward's `state`. Arguments as in `forward`."""
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, q_starts, k_starts, max_q, max_k, 0.0, is_causal, *state, scale=scale, **_sides(window)
    )


def _sides(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
