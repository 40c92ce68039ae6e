"""Confidence intervals and tests for accuracies: is a difference larger than chance?"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z_95 = 1.96  # standard normal quantile of a two-sided 95% interval


def wilson_interval(successes: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a share: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n).

    Args:
        successes: number of successes, in [0, n].
        n: number of trials; 0 gives (0, 1), nothing is known.
        z: standard normal quantile; 1.96 for 95%.

    Returns:
        Lower and upper bound, in [0, 1].

    Raises:
        ValueError: if n is negative or successes lies outside [0, n].

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"successes must lie in [0, n], got {successes} of n={n}")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = share + z * z / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)


def difference_interval(
    successes_before: float, n_before: int, successes_after: float, n_after: int, z: float = Z_95
) -> tuple[float, float]:
    """Newcombe's interval of `after - before` for two independent shares, built from their Wilson intervals.

    With d = p2 - p1: (d - sqrt((p2 - l2)² + (u1 - p1)²), d + sqrt((u2 - p2)² + (p1 - l1)²)). Two evaluations on the
    same problems are positively correlated as a rule; the interval is then wider than needed, never misleading.

    Raises:
        ValueError: if a count is 0 or successes lie outside [0, n].

    Source: Newcombe 1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I, method 10.
    """
    if n_before < 1 or n_after < 1:
        raise ValueError(f"a difference needs at least one trial on each side, got {n_before} and {n_after}")
    before, after = successes_before / n_before, successes_after / n_after
    low_before, high_before = wilson_interval(successes_before, n_before, z)
    low_after, high_after = wilson_interval(successes_after, n_after, z)
    difference = after - before
    return (
        difference - math.hypot(after - low_after, high_before - before),
        difference + math.hypot(high_after - after, before - low_before),
    )


def paired_interval(before: Sequence[float], after: Sequence[float], z: float = Z_95) -> tuple[float, float]:
    """Interval of the mean of `after[i] - before[i]`: m ± z s / sqrt(n), s^2 the sample variance of the differences.

    Args:
        before: a value for each problem.
        after: for the same problems, in the same order; both have at least two.

    Raises:
        ValueError: fewer than two problems, or other numbers of them.
    """
    if len(before) != len(after) or len(before) < 2:
        raise ValueError(f"pairs of values of at least two problems expected, got {len(before)} and {len(after)}")
    differences = [b - a for a, b in zip(before, after, strict=True)]
    mean = math.fsum(differences) / len(differences)
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1)
    half_width = z * math.sqrt(variance / len(differences))
    return mean - half_width, mean + half_width


def sign_test_p(num_gained: int, num_lost: int) -> float:
    """Exact two-sided McNemar p: how likely a split at least this uneven is if gains and losses are coin flips.

    Args:
        num_gained: problems wrong before and right after.
        num_lost: problems right before and wrong after.

    Returns:
        min(1, 2 · sum_{k <= min(gained, lost)} C(n, k) / 2^n) with n = gained + lost; 1.0 for n = 0.
    """
    n = num_gained + num_lost
    tail = sum(math.comb(n, k) for k in range(min(num_gained, num_lost) + 1))
    return min(1.0, 2 * tail / 2**n)
