"""Advantages of a group's rollouts from their rewards."""

from collections.abc import Sequence
from statistics import fmean, stdev

_EPSILON = 1e-4  # keeps a group of almost equal rewards from exploding; the value of the DeepSeek and TRL code


def group_relative_advantages(rewards: Sequence[float], *, scale_by_std: bool) -> list[float]:
    """A_i = r_i - mean(r), divided by std(r) + 1e-4 if `scale_by_std`.

    Args:
        rewards: one per rollout of the group, at least two.
        scale_by_std: divide by the sample standard deviation (GRPO); without it the advantages are those of Dr.GRPO.

    Returns:
        One advantage per rollout; all exactly 0.0 if the rewards are equal.

    Raises:
        ValueError: with fewer than two rewards there is nothing to compare.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1; Liu et al. 2025, arXiv:2503.20783, section 3.2.
    """
    if len(rewards) < 2:
        raise ValueError(f"group-relative advantages need at least two rewards, got {len(rewards)}")
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    scale = stdev(rewards) + _EPSILON if scale_by_std else 1.0
    return [(reward - mean) / scale for reward in rewards]
