"""Generalised advantage estimation: advantages of single tokens from a critic's values, and what the critic learns.

State t of a completion is the prompt with the tokens before t; V_t is its value, taken before token t is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlbench.algorithms.advantages import GroupReturns, TokenAdvantages, normalised_over_tokens


def gae(groups: Sequence[GroupReturns], *, scale: str, gamma: float, gae_lambda: float) -> TokenAdvantages:
    """`estimate` of every rollout; with scale=batch normalised over all tokens of the step: (A - mean) / (std + 1e-4).

    Args:
        groups: of one step, with `values`.
        scale: batch | none.
        gamma: discount a token, in [0, 1].
        gae_lambda: in [0, 1].

    Source: Schulman et al. 2016, arXiv:1506.02438; whitening as in Ziegler et al. 2019, arXiv:1909.08593.
    """
    advantages = _of_groups(groups, gamma, gae_lambda)
    return normalised_over_tokens(advantages) if scale == "batch" else advantages


def value_targets(groups: Sequence[GroupReturns], *, gamma: float, gae_lambda: float) -> TokenAdvantages:
    """A_t + V_t of every token, A as in `estimate`: with gae_lambda=1 the discounted return, with 0 one step ahead.

    Args as in `gae`.
    """
    return [
        [
            [a + v for a, v in zip(tokens, values, strict=True)]
            for tokens, values in zip(of_group, group.values, strict=True)
        ]
        for of_group, group in zip(_of_groups(groups, gamma, gae_lambda), groups, strict=True)
    ]


def estimate(
    rewards: Sequence[float], values: Sequence[float], last_value: float, *, gamma: float, gae_lambda: float
) -> list[float]:
    """A_t = delta_t + gamma lambda A_{t+1}, with delta_t = r_t + gamma V_{t+1} - V_t.

    Args:
        rewards: r_t of each token.
        values: V_t of each token.
        last_value: of the state after the last token; 0 where the completion ended there.
        gamma: in [0, 1].
        gae_lambda: in [0, 1].
    """
    advantages: list[float] = []
    following, later = last_value, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        later = reward + gamma * following - value + gamma * gae_lambda * later
        following = value
        advantages.append(later)
    return advantages[::-1]


def _of_groups(groups: Sequence[GroupReturns], gamma: float, gae_lambda: float) -> TokenAdvantages:
    return [
        [
            estimate(_token_rewards(returns), values, last, gamma=gamma, gae_lambda=gae_lambda)
            for returns, values, last in zip(group.returns, group.values, group.last_values, strict=True)
        ]
        for group in groups
    ]


def _token_rewards(returns: Sequence[float]) -> list[float]:
    """r_t = R_t - R_{t+1}: 0 but for the KL penalties, and the reward itself at the last token."""
    return [now - after for now, after in zip(returns, [*returns[1:], 0.0], strict=True)]
