"""Which tokens a sampler could have drawn: a score for each row, below which top_p, top_k and min_p leave tokens out.

Shapes: N rows, n rows of one chunk, D hidden, V vocabulary.
Source: top-k, Fan et al. 2018, arXiv:1805.04833; top-p, Holtzman et al. 2020, arXiv:1904.09751; min-p, Nguyen et al.
2024, arXiv:2407.01082.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlbench_kernels.launch import use_triton
from rlbench_kernels.linear_logprobs_head import Head, accumulation_dtype, check_head
from rlbench_kernels.linear_logprobs_reference import to_scores
from rlbench_kernels.lora_linear import Lora

# One buffer of scores [n, V]. With few rows a chunk is done sooner than the weights are read from a GPU's memory.
_CPU_ELEMENTS, _GPU_ELEMENTS = 2**24, 2**26
_SHORTLIST = 1024  # a full sort of [64, 49152] takes 117 ms on 2 CPU cores, topk of 1024 about 5 ms


@torch.no_grad()
def support_thresholds(
    hidden: Tensor,
    weight: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> Tensor:
    """threshold[i]: tokens of row i with s < threshold[i] are those that truncation leaves out; s of `linear_logprobs`.

    Order of truncation, as in vLLM: temperature, min_p (s at least max s + log min_p), top_k (the k highest), then
    top_p: the fewest of the highest that are left whose share of what is left reaches top_p. At least one is kept.
    The threshold lies halfway between the lowest score inside and the highest outside, so that another kernel's
    rounding of the scores moves no token across it. Tokens with equal scores are all inside or all outside: where
    top_k or top_p ends among equal scores all of them are inside, while a sampler keeps some.
    On a GPU nothing is waited for; the reference looks whether the shortlist of 1,024 tokens reaches top_p.

    Args:
        hidden, weight, temperature, softcap, bias, lora: as in `linear_logprobs`.
        top_p: in (0, 1]; 1 keeps every token.
        top_k: >= 0; 0 keeps every token.
        min_p: in [0, 1]; 0 keeps every token.

    Returns:
        float32 [N] (float64 for float64 inputs), without gradient: `support` of `linear_logprobs`. -inf where every
        token is inside.

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit.
    """
    head = Head(weight, bias, temperature, softcap, lora=lora)
    check_head(hidden, head)
    _check_truncation(top_p, top_k, min_p)
    thresholds = hidden.new_full((len(hidden),), -math.inf, dtype=accumulation_dtype(hidden.dtype))
    if top_p == 1 and not 0 < top_k < len(weight) and min_p == 0:
        return thresholds
    size = max(1, (_CPU_ELEMENTS if hidden.device.type == "cpu" else _GPU_ELEMENTS) // len(weight))
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        scores = _scores(hidden[rows], head.rows(rows))
        below = _below_min_p_and_top_k(scores, top_k, min_p)
        thresholds[rows] = _thresholds(scores, below, top_p)
    return thresholds


def _scores(hidden: Tensor, head: Head) -> Tensor:
    """[n, V] in the accumulation dtype; 16-bit logits are rounded where `ReferenceSoftmax` rounds them."""
    dtype = accumulation_dtype(hidden.dtype)
    if use_triton(hidden.device) and dtype == torch.float32:
        from rlbench_kernels.linear_logprobs_triton import multiply

        scores = hidden.new_empty((len(hidden), len(head.weight)), dtype=dtype)
        multiply(hidden, head.weight.T, scores)
    else:
        scores = (hidden @ head.weight.T).to(dtype)
    if head.lora is not None:
        a, b = head.cast_lora(dtype)
        scores.addmm_(hidden.to(dtype) @ a.T, b.T)
    to_scores(scores, head)
    return scores


def _below_min_p_and_top_k(scores: Tensor, top_k: int, min_p: float) -> Tensor:
    """[n]: tokens whose score is not above it are out; -inf for none."""
    below = scores.new_full((len(scores),), -math.inf)
    if min_p > 0:
        below = _just_below(scores.amax(-1) + math.log(min_p))
    if 0 < top_k < scores.shape[1]:
        below = torch.maximum(below, _just_below(scores.topk(top_k).values[:, -1]))
    return below


def _thresholds(scores: Tensor, below: Tensor, top_p: float) -> Tensor:
    """[n]: halfway between the lowest score inside and the highest outside."""
    if use_triton(scores.device) and scores.dtype == torch.float32:
        from rlbench_kernels.linear_logprobs_support_triton import triton_thresholds

        return triton_thresholds(scores, below, top_p)
    if top_p < 1:
        below = torch.maximum(below, _below_top_p(scores.masked_fill(scores <= below[:, None], -math.inf), top_p))
    is_inside = scores > below[:, None]
    lowest = scores.masked_fill(~is_inside, math.inf).amin(-1)
    highest_outside = scores.masked_fill_(is_inside, -math.inf).amax(-1)
    middle = 0.5 * lowest + 0.5 * highest_outside
    threshold = torch.where(middle > highest_outside, middle, lowest)
    return torch.where(highest_outside == -math.inf, highest_outside, threshold)


def _below_top_p(scores: Tensor, top_p: float) -> Tensor:
    """[n]: just below the lowest score of the fewest highest tokens whose probability reaches top_p."""
    probs = scores.softmax(-1)
    size = min(_SHORTLIST, scores.shape[1])
    top = probs.topk(size, dim=-1)  # [n, size], highest first
    lowest = _lowest_in_top_p(scores, top, top_p)
    is_short = top.values.sum(-1) < top_p
    if size < scores.shape[1] and bool(is_short.any()):
        ordered = probs[is_short].sort(dim=-1, descending=True)
        lowest[is_short] = _lowest_in_top_p(scores[is_short], ordered, top_p)
    return _just_below(lowest)


def _lowest_in_top_p(scores: Tensor, ordered: Any, top_p: float) -> Tensor:
    """[n]; ordered: probabilities, highest first, as values and indices."""
    probs, indices = ordered
    num_inside = (probs.cumsum(-1) - probs < top_p).sum(-1).clamp(min=1)
    return scores.gather(1, indices.gather(1, num_inside[:, None] - 1))[:, 0]


def _just_below(values: Tensor) -> Tensor:
    return torch.nextafter(values, torch.full_like(values, -math.inf))


def _check_truncation(top_p: float, top_k: int, min_p: float) -> None:
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: above 0 and at most 1 expected, got {top_p}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k: a whole number, at least 0, expected, got {top_k}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p: 0 to 1 expected, got {min_p}")
