"""Penalties that are added to a rollout's reward before advantages are taken."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def overlong_penalty(num_tokens: int, *, max_tokens: int, buffer_tokens: int, penalty: float) -> float:
    """0 up to max - buffer, then falling linearly to -penalty at max tokens.

    Args:
        num_tokens: of the completion.
        max_tokens: sampling.max_tokens.
        buffer_tokens: > 0; length of the slope.
        penalty: at the limit.

    Returns:
        At most 0.

    Source: DAPO, arXiv:2503.14476, section 3.4 (soft overlong punishment).
    """
    excess = num_tokens - (max_tokens - buffer_tokens)
    return -penalty * min(1.0, max(0.0, excess / buffer_tokens))


def returns_to_go(reward: float, token_kl: Sequence[float], kl_coef: float) -> list[float]:
    """R_t = reward - kl_coef sum_{s >= t} kl_s for each token.

    Source: arXiv:2501.03262, the token-level KL penalty of REINFORCE++; R_0 is the penalised reward of RLOO.
    """
    remaining = list(accumulate(reversed(token_kl)))[::-1]
    return [reward - kl_coef * kl for kl in remaining]
