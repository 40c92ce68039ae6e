"""Laws and hand-computed values of the advantages."""

import pytest

from rlbench.algorithms.advantages import group_relative_advantages


def test_group_relative_matches_hand_computed_values():
    # mean 0.25, sample standard deviation 0.5
    advantages = group_relative_advantages([1.0, 0.0, 0.0, 0.0], scale_by_std=True)

    assert advantages == pytest.approx([0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001])


def test_without_scaling_the_advantage_is_the_distance_to_the_mean():
    assert group_relative_advantages([3.0, 1.0], scale_by_std=False) == [1.0, -1.0]


def test_advantages_sum_to_zero_and_follow_a_permutation():
    rewards = [0.1, 0.9, 0.4, 0.4, 0.7]
    order = [3, 0, 4, 1, 2]

    advantages = group_relative_advantages(rewards, scale_by_std=True)
    permuted = group_relative_advantages([rewards[i] for i in order], scale_by_std=True)

    assert sum(advantages) == pytest.approx(0.0, abs=1e-12)
    assert permuted == pytest.approx([advantages[i] for i in order])


def test_equal_rewards_have_exactly_no_advantage():
    assert group_relative_advantages([0.1] * 3, scale_by_std=True) == [0.0, 0.0, 0.0]


def test_one_reward_cannot_be_compared():
    with pytest.raises(ValueError, match="at least two rewards, got 1"):
        group_relative_advantages([1.0], scale_by_std=True)
