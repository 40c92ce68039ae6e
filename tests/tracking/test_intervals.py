"""Hand-computed intervals and tests of shares."""

import pytest

from rlbench.tracking.intervals import difference_interval, paired_interval, sign_test_p, wilson_interval


def test_wilson_interval_matches_hand_computed_values():
    # n = 10, p = 0.8, z² = 3.8416: (0.8 + 0.19208 ± 1.96 sqrt(0.016 + 0.009604)) / 1.38416
    assert wilson_interval(8, 10) == pytest.approx((0.490158, 0.943317), abs=1e-5)
    # p = 0: (0.19208 ± 0.19208) / 1.38416
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.277541), abs=1e-5)


def test_wilson_interval_of_failures_mirrors_that_of_successes():
    low, high = wilson_interval(3, 17)
    assert wilson_interval(14, 17) == pytest.approx((1 - high, 1 - low))


def test_wilson_interval_without_trials_knows_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="got 11 of n=10"):
        wilson_interval(11, 10)


def test_difference_interval_matches_newcombes_published_example():
    # Newcombe 1998, table II, example (a): 56/70 - 48/80, method 10: 0.0524 to 0.3339
    assert difference_interval(48, 80, 56, 70) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_sign_test_matches_hand_computed_values():
    assert sign_test_p(5, 0) == pytest.approx(2 / 32)
    assert sign_test_p(1, 4) == pytest.approx(2 * (1 + 5) / 32)
    assert sign_test_p(3, 3) == 1.0
    assert sign_test_p(0, 0) == 1.0


def test_paired_interval_by_hand_and_narrower_than_that_of_independent_shares():
    # differences 1, 0, 0, 1: mean 0.5, variance 1/3, half width 1.96 * sqrt(1/12)
    assert paired_interval([0, 0, 1, 0], [1, 0, 1, 1]) == pytest.approx((0.5 - 0.565803, 0.5 + 0.565803), abs=1e-5)
    before, after = [0.0] * 60 + [1.0] * 40, [0.0] * 50 + [1.0] * 50
    low, high = paired_interval(before, after)
    loose = difference_interval(40, 100, 50, 100)
    assert loose[0] < 0 < low < 0.1 < high < loose[1]


@pytest.mark.parametrize("values", [([], []), ([1.0], [1.0]), ([1.0, 0.0], [1.0])])
def test_paired_interval_needs_pairs(values):
    with pytest.raises(ValueError, match="at least two problems"):
        paired_interval(*values)
