"""Laws and hand-computed values of the advantages."""

import math
from statistics import fmean, pstdev, stdev

import pytest

from rlbench.algorithms import ADVANTAGES
from rlbench.algorithms.advantages import GROUP_ADVANTAGES, GroupReturns
from rlbench.config.algorithm import ADVANTAGES as SPECS

# laws of advantages that need rewards alone; those of GAE are in test_gae.py
CASES = [(name, scale) for name, spec in SPECS.items() if name in GROUP_ADVANTAGES for scale in spec.scales or [None]]


def groups_of(*groups: list[float], num_tokens: int = 2) -> list[GroupReturns]:
    return [
        GroupReturns(returns=[[r] * num_tokens for r in rewards], components={"a": rewards}, weights={"a": 1.0})
        for rewards in groups
    ]


def values(name: str, groups: list[GroupReturns], scale: str | None = None) -> list[list[float]]:
    """Advantages of the first tokens; the others must be equal."""
    result = ADVANTAGES[name](groups, **({} if scale is None else {"scale": scale}))
    assert all(len(set(tokens)) == 1 for group in result for tokens in group)
    return [[tokens[0] for tokens in group] for group in result]


def test_every_advantage_of_the_config_has_a_function():
    assert set(ADVANTAGES) == set(SPECS)
    assert all((spec.default_scale in spec.scales) == bool(spec.scales) for spec in SPECS.values())


def test_group_relative_matches_hand_computed_values():
    # mean 0.25, sample standard deviation 0.5
    (advantages,) = values("group_relative", groups_of([1.0, 0.0, 0.0, 0.0]), "group")

    assert advantages == pytest.approx([0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001])


def test_without_scale_the_advantage_is_the_distance_to_the_mean():
    assert values("group_relative", groups_of([3.0, 1.0]), "none") == [[1.0, -1.0]]


def test_the_batch_scale_is_the_deviation_of_all_rewards():
    advantages = values("group_relative", groups_of([3.0, 1.0], [1.0, 1.0]), "batch")

    assert advantages[0] == pytest.approx([1 / 1.0001, -1 / 1.0001])  # rewards 3 1 1 1: sample deviation 1
    assert advantages[1] == [0.0, 0.0]


def test_leave_one_out_compares_with_the_others():
    (advantages,) = values("leave_one_out", groups_of([1.0, 0.0, 0.5]), "none")

    assert advantages == pytest.approx([1 - 0.25, 0 - 0.75, 0.5 - 0.5])


def test_gdpo_keeps_apart_what_a_sum_makes_equal():
    # Rewards (1, 0) and (0, 1) have the same sum; only the second is rare.
    group = GroupReturns(
        returns=[[1.0], [1.0], [1.0]],
        components={"a": [1.0, 1.0, 0.0], "b": [0.0, 0.0, 1.0]},
        weights={"a": 1.0, "b": 2.0},
    )
    # each normalised: +-1/sqrt(3) and 2/sqrt(3) (1 + 1e-4 / deviation aside); sums -1/sqrt(3) twice, 2/sqrt(3)
    (advantages,) = values("gdpo", [group])

    assert advantages == pytest.approx([-1 / math.sqrt(3), -1 / math.sqrt(3), 2 / math.sqrt(3)], rel=1e-3)
    assert values("group_relative", [group], "group") == [[0.0, 0.0, 0.0]]


def test_a_reward_that_does_not_apply_to_a_rollout_is_no_zero_for_gdpo():
    components = {"a": [0.9, 0.7, None, 0.8], "b": [1.0, 0.0, 1.0, 0.0]}
    group = GroupReturns(returns=[[1.0]] * 4, components=components, weights={"a": 1.0, "b": 2.0})
    by_b = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    sums = [0.1 / 0.1001 + 2 * by_b, -0.1 / 0.1001 - 2 * by_b, 2 * by_b, -2 * by_b]  # of a: mean 0.8, deviation 0.1

    (advantages,) = values("gdpo", [group])

    assert advantages == pytest.approx([value / (stdev(sums) + 1e-4) for value in sums])


def test_gdpo_gives_exactly_no_advantage_to_a_group_without_signal_among_others():
    for scale in (1.0, 0.7, 1 / 3):
        _, equal = values("gdpo", groups_of([scale, 0.0, 0.0], [1.0, 1.0, 1.0]))
        assert equal == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_rewards_that_only_rounding_tells_apart_are_equal(name, scale):
    rewards = [0.1 + 0.2, 0.3, 0.3]
    assert rewards[0] != rewards[1]

    assert values(name, groups_of(rewards), scale) == [[0.0] * 3]


def test_reinforce_plus_plus_normalises_over_all_tokens():
    groups = [GroupReturns(returns=[[1.0, 1.0, 1.0]]), GroupReturns(returns=[[0.0]])]
    result = ADVANTAGES["reinforce_plus_plus"](groups)

    # mean 0.75, sample deviation 0.5
    assert result[0][0] == pytest.approx([0.25 / 0.5001] * 3)
    assert result[1][0] == pytest.approx([-0.75 / 0.5001])


def test_reinforce_plus_plus_tells_tokens_apart_by_their_returns():
    result = ADVANTAGES["reinforce_plus_plus"]([GroupReturns(returns=[[0.2, 0.6], [1.0, 1.0]])])

    assert result[0][0][0] < result[0][0][1] < 0 < result[0][1][0]


def test_the_baseline_variant_compares_within_groups_first():
    easy, hard = values("reinforce_plus_plus_baseline", groups_of([1.0, 0.5], [0.5, 0.0]))

    assert easy == hard == pytest.approx([0.25 / (math.sqrt(8 / 7) * 0.25 + 1e-4), -easy[0]])


def test_maxrl_divides_by_the_success_rate():
    hard, easy, hopeless = values("maxrl", groups_of([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0] * 4))

    assert hard == pytest.approx([3.0, -1.0, -1.0, -1.0])
    assert easy == pytest.approx([1 / 3, 1 / 3, 1 / 3, -1.0])
    assert hopeless == [0.0] * 4


def test_maxrl_needs_rewards_that_are_not_negative():
    with pytest.raises(ValueError, match="algorithm.advantage is maxrl, but a reward is -1.0"):
        values("maxrl", groups_of([1.0, -1.0]))


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_advantages_follow_a_permutation_within_a_group(name, scale):
    rewards, others = [0.1, 0.9, 0.4, 0.4, 0.7], [0.0, 1.0, 0.0]
    order = [3, 0, 4, 1, 2]

    straight = values(name, groups_of(rewards, others), scale)
    permuted = values(name, groups_of([rewards[i] for i in order], others), scale)

    assert permuted[0] == pytest.approx([straight[0][i] for i in order])
    assert permuted[1] == pytest.approx(straight[1])


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_equal_rewards_have_exactly_no_advantage(name, scale):
    assert values(name, groups_of([0.1] * 3, [0.1] * 3), scale) == [[0.0] * 3] * 2


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_advantages_have_mean_zero_over_the_step(name, scale):
    flat = [v for group in values(name, groups_of([0.1, 0.9, 0.4], [0.0, 1.0, 1.0]), scale) for v in group]

    assert fmean(flat) == pytest.approx(0.0, abs=1e-12)
    assert pstdev(flat) > 0.1


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.min_group_size > 1])
def test_one_reward_cannot_be_compared(name):
    with pytest.raises(ValueError, match="at least two rewards, got 1"):
        values(name, groups_of([1.0]), SPECS[name].default_scale)
