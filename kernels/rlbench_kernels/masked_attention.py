"""Attention under an explicit mask, with a cap on the scores: the meaning that every backend is compared with.

Shapes: B sequences, H heads, L queries, S keys, d features of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None = None
) -> Tensor:
    """softmax(cap(scale q k^T) + mask) v, cap(z) = softcap tanh(z / softcap).

    Args:
        q: [B, H, L, d]. k, v: [B, H, S, d].
        mask: added to the scores, in q's dtype, broadcast to [B, H, L, S]: 0 where attended, -inf elsewhere. None:
            causal, L = S.
        scale: of the scores.
        softcap: > 0, or None.

    Returns:
        [B, H, L, d]. Without softcap by `F.scaled_dot_product_attention`; with it the scores are in memory, rounded to
        q's dtype, the softmax is float32 (float64 for float64 inputs).
    """
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    scores = cap_scores(q @ k.transpose(-1, -2) * scale, softcap)
    if mask is None:
        is_hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(is_hidden, float("-inf"))
    else:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


def cap_scores(scores: Tensor, softcap: float | None) -> Tensor:
    """softcap tanh(scores / softcap); None leaves them.

    Source: Gemma 2, arXiv:2408.00118, section 2.
    """
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def additive(is_visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask that `masked_attention` adds: 0 where True, -inf elsewhere."""
    return torch.zeros(is_visible.shape, dtype=dtype, device=is_visible.device).masked_fill_(~is_visible, float("-inf"))
