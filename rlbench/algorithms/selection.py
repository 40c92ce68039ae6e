"""Tokens that are singled out over the whole batch before its first update: by entropy, or by covariance.

Shapes: T loss tokens of the whole batch (masked ones are not among them).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def top_entropy_threshold(entropies: Tensor, top_frac: float) -> float:
    """The entropy that `top_frac` of the tokens reach: the (1 - top_frac) quantile.

    Args:
        entropies: float32 [T], nats; at least one.
        top_frac: in (0, 1].

    Source: Wang et al. 2025, arXiv:2506.01939 (training on the 20% of tokens of highest entropy).
    """
    # torch.quantile refuses more than 2^24 values; a sort does not.
    ordered = entropies.float().sort().values
    position = (1 - top_frac) * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return float(torch.lerp(ordered[below], ordered[above], position - below))


def covariances(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """(logprob_t - mean logprob) (A_t - mean A): how much an update on the token lowers the entropy.

    Args:
        logprobs: float32 [T].
        advantages: float32 [T].

    Returns:
        float32 [T].

    Source: Cui et al. 2025, arXiv:2505.22617, section 4. Means over the whole batch, logprobs before its first update.
    """
    return (logprobs - logprobs.mean()) * (advantages - advantages.mean())


def select_at_random_within(
    covariance: Tensor,
    generator: torch.Generator,
    *,
    covariance_frac: float,
    covariance_low: float,
    covariance_high: float,
    **_: Any,
) -> Tensor:
    """bool [T]: at most `covariance_frac` T tokens (at least one), at random within the bounds."""
    candidates = ((covariance >= covariance_low) & (covariance <= covariance_high)).nonzero().flatten()
    count = max(1, int(covariance_frac * len(covariance)))
    order = torch.randperm(len(candidates), generator=generator).to(covariance.device)
    selected = torch.zeros_like(covariance, dtype=torch.bool)
    selected[candidates[order[:count]]] = True
    return selected


def select_highest(covariance: Tensor, generator: torch.Generator, *, covariance_frac: float, **_: Any) -> Tensor:
    """bool [T]: the `covariance_frac` T tokens (at least one) of highest covariance."""
    count = max(1, int(covariance_frac * len(covariance)))
    selected = torch.zeros_like(covariance, dtype=torch.bool)
    selected[covariance.topk(count).indices] = True
    return selected
