from itertools import combinations
from statistics import fmean

import pytest

from rlbench.tracking.intervals import wilson_interval
from rlbench.tracking.pass_rates import all_equal_at_k, pass_at_k, share_interval


@pytest.mark.parametrize("num_correct", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_mean_over_all_draws(num_correct, k):
    attempts = [1] * num_correct + [0] * (6 - num_correct)

    assert pass_at_k(6, num_correct, k) == pytest.approx(fmean(any(draw) for draw in combinations(attempts, k)))


@pytest.mark.parametrize("k", range(1, 7))
def test_all_equal_at_k_is_the_mean_over_all_draws(k):
    values = ["a", "a", "a", "b", "b", "c"]

    assert all_equal_at_k(values, k) == pytest.approx(fmean(len(set(d)) == 1 for d in combinations(values, k)))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=f"got k={k}, n={n}, c={c}"):
        pass_at_k(n, c, k)


def test_all_equal_at_k_refuses_more_draws_than_values():
    with pytest.raises(ValueError, match="got k=3, n=2"):
        all_equal_at_k([1, 2], 3)


def test_attempts_that_are_all_alike_within_a_problem_count_once():
    by_problem = [1.0] * 5 + [0.0] * 15  # as uneven between problems as can be

    low, high = share_interval(by_problem, samples_per_problem=8)

    assert (low, high) == pytest.approx(wilson_interval(5, 20), abs=0.01)


def test_attempts_that_do_not_depend_on_the_problem_count_almost_each():
    by_problem = [0.25] * 10 + [0.375] * 10

    low, high = share_interval(by_problem, samples_per_problem=8)

    assert (low, high) == pytest.approx(wilson_interval(50, 160), abs=1e-9)


def test_problems_that_do_not_differ_give_the_cautious_interval():
    assert share_interval([0.0] * 20, samples_per_problem=8) == wilson_interval(0, 20)
    assert share_interval([]) == (0.0, 1.0)
