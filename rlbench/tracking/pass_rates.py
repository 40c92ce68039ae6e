"""How often a policy solves a problem in k attempts, and how often k attempts are all alike, from n recorded ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import fmean, pvariance

from rlbench.tracking.intervals import wilson_interval


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that at least one of k attempts is right: 1 - C(n - c, k) / C(n, k), unbiased for n >= k.

    Args:
        num_samples: attempts at one problem, n.
        num_correct: right ones among them, c.
        k: attempts that are drawn.

    Raises:
        ValueError: k is below 1 or above n, or c lies outside [0, n].

    Source: Chen et al. 2021, arXiv:2107.03374, eq. 1.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"expected 1 <= k <= n and 0 <= c <= n, got k={k}, n={num_samples}, c={num_correct}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def all_equal_at_k(values: Sequence[Hashable], k: int) -> float:
    """Probability that k of the n values are all equal: sum over distinct values of C(count, k) / C(n, k).

    Raises:
        ValueError: k is below 1 or above n.
    """
    if not 1 <= k <= len(values):
        raise ValueError(f"expected 1 <= k <= n, got k={k}, n={len(values)}")
    return sum(math.comb(count, k) for count in Counter(values).values()) / math.comb(len(values), k)


def share_interval(by_problem: Sequence[float], samples_per_problem: int = 1) -> tuple[float, float]:
    """95% interval of a share that is a mean over problems of values in [0, 1].

    Attempts at one problem are alike, so they count for fewer than their number: Wilson's interval at the effective
    number of trials p(1 - p) / (s^2 / P), P problems with variance s^2 between them, at least P and at most all
    attempts. Where the problems do not differ it is P, the cautious end.

    Args:
        by_problem: one value a problem; none gives (0, 1).
        samples_per_problem: attempts behind each value.

    Source: effective sample size under clustering, Kish 1965, Survey Sampling, section 5.4.
    """
    num_problems = len(by_problem)
    if not num_problems:
        return wilson_interval(0, 0)
    share = min(1.0, max(0.0, fmean(by_problem)))
    between = pvariance(by_problem) * num_problems / max(1, num_problems - 1)
    num_trials = share * (1 - share) * num_problems / between if between > 0 else num_problems
    num_trials = min(max(num_trials, num_problems), num_problems * samples_per_problem)
    return wilson_interval(share * num_trials, num_trials)
