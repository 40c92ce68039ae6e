"""Drawing tokens: truncation, inverse-CDF sampling with counter-based uniforms, and the log-probability of the draw.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlbench.records import SamplingParams

_SHORTLIST = 1024  # a full sort of [64, 49152] takes 117 ms on 2 CPU cores, topk of 1024 about 5 ms
_BLOCK = 128  # divides most vocabulary sizes


def draw_tokens(logits: Tensor, sampling: SamplingParams, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution at the row's uniform number.

    Each row is computed on its own: its token does not depend on the other rows.

    Args:
        logits: [B, V], any float dtype, after penalties; not changed.
        sampling: temperature 0 takes the argmax. Order of truncation: temperature, min_p, top_k, then top_p of what is
            left, as in vLLM.
        uniforms: float64 [B] in [0, 1).

    Returns:
        Token ids int64 [B] and their log-probabilities float32 [B] under the distribution drawn from (for temperature
        0: under the softmax of `logits`).
    """
    scores = logits.float()
    if sampling.temperature == 0:
        tokens = scores.argmax(dim=-1)
        return tokens, plain_logprobs(scores, tokens, 0)
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    scores = truncate(scores, sampling)
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    tokens, total = invert_cumulative(weights, uniforms)
    logprobs = torch.log(weights.gather(1, tokens[:, None])[:, 0] / total)
    return tokens, logprobs.float()


def invert_cumulative(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The token of each row in whose part of the row's total weight the uniform number lies.

    Two steps, first the block of `_BLOCK` tokens, then the token: a cumulative sum over the vocabulary costs several
    passes over [B, V], and on a GPU its rounding depends on the number of rows.

    Args:
        weights: float32 [B, V], not negative, at least one positive a row; they need not sum to 1.
        uniforms: float64 [B] in [0, 1).

    Returns:
        Token ids int64 [B], never one of weight 0; total weights float64 [B].
    """
    blocks = F.pad(weights, (0, -weights.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))  # [B, V / block, block]
    sums = blocks.sum(dim=-1).double()
    ends = sums.cumsum(dim=-1)
    total = ends[:, -1:]
    target = torch.minimum(uniforms[:, None] * total, _just_below(total))
    block = torch.searchsorted(ends, target, right=True)  # [B, 1]
    chosen = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK))[:, 0].double()  # [B, block]
    ends_inside = chosen.cumsum(dim=-1)
    inside = target - (ends - sums).gather(1, block)
    # The float32 sum of the block rounds: the last token with weight is then the right answer.
    inside = torch.minimum(inside.clamp(min=0), _just_below(ends_inside[:, -1:]))
    tokens = block * _BLOCK + torch.searchsorted(ends_inside, inside, right=True)
    return tokens[:, 0], total[:, 0]


def _just_below(value: Tensor) -> Tensor:
    return torch.nextafter(value, torch.zeros_like(value))


def plain_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log_softmax(logits / temperature) at the drawn tokens; temperature 0 counts as 1. [B, V], [B] -> float32 [B]."""
    scores = logits.float()
    if temperature not in (0, 1):
        scores = scores / temperature
    return scores.gather(1, tokens[:, None])[:, 0] - scores.logsumexp(dim=-1)


def truncate(scores: Tensor, sampling: SamplingParams) -> Tensor:
    """Set to -inf what min_p, top_k and top_p exclude; [B, V] -> [B, V]. At least one token a row is kept."""
    if sampling.min_p > 0:
        floor = scores.amax(dim=-1, keepdim=True) + float(np.log(sampling.min_p))
        scores = scores.masked_fill(scores < floor, float("-inf"))
    if 0 < sampling.top_k < scores.shape[-1]:
        kept = scores.topk(sampling.top_k, dim=-1)
        scores = torch.full_like(scores, float("-inf")).scatter(1, kept.indices, kept.values)
    if sampling.top_p < 1:
        scores = _keep_top_p(scores, sampling.top_p)
    return scores


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose mass reaches top_p."""
    probs = scores.softmax(dim=-1)
    size = min(_SHORTLIST, probs.shape[-1])
    top = probs.topk(size, dim=-1)
    if bool((top.values.sum(dim=-1) < top_p).any()) and size < probs.shape[-1]:
        top = probs.sort(dim=-1, descending=True, stable=True)
    mass_before = top.values.cumsum(dim=-1) - top.values
    is_kept = (mass_before < top_p) & (top.values > 0)
    is_kept[:, 0] = True
    keep = torch.zeros_like(probs, dtype=torch.bool).scatter(1, top.indices, is_kept)
    return scores.masked_fill(~keep, float("-inf"))


def counter_uniforms(seeds: Sequence[int], positions: int | Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1), one per seed, as a pure function of (seed, position): splitmix64 of their mix.

    Args:
        seeds: unsigned 64-bit integers.
        positions: index of the token in its completion, from 0; one for all seeds, or one a seed.

    Returns:
        float64 [B], multiples of 2**-53.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators" (splitmix64 finaliser).
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    steps = np.atleast_1d(np.asarray(positions, dtype=np.uint64)) + np.uint64(1)
    mixed = _finalise(_finalise(np.asarray(seeds, dtype=np.uint64)) + steps * golden)
    return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _finalise(z: np.ndarray) -> np.ndarray:
    """uint64 to uint64; arithmetic wraps around."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
