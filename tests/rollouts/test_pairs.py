"""Pairs of rollouts: who is chosen, who makes no pair, what counts as no signal."""

from dataclasses import replace

import pytest

from rlbench.config.pairs import PairsConfig
from rlbench.config.schema import AlgorithmConfig, RewardsConfig
from rlbench.records import FINISH_LENGTH, RolloutGroup
from rlbench.rollouts.credit import RewardFailure
from rlbench.rollouts.pairs import choose_pairs, has_pair, pair_up
from tests.rollouts.test_credit import make_group

BEST, ALL = PairsConfig(choice="best_worst"), PairsConfig(choice="all")
LIMIT = 8


def distinct(group: RolloutGroup) -> RolloutGroup:
    """`make_group` writes the same completion for all; here each has its own."""
    rollouts = [
        replace(r, completion=replace(r.completion, token_ids=(3, 4, 10 + r.sample_index))) for r in group.rollouts
    ]
    return replace(group, rollouts=tuple(rollouts))


def paired(groups, pairs=BEST, rewards=None, **algorithm):
    config = AlgorithmConfig(pairs=pairs, **algorithm)
    return pair_up(groups, config, rewards or RewardsConfig(), max_completion_tokens=LIMIT)


def names(credited) -> list[tuple[str, int, int]]:
    """(prompt, last token of the chosen, of the rejected)."""
    return [
        (credited.samples[i].group_id, credited.samples[i].token_ids[-1] - 10, credited.samples[j].token_ids[-1] - 10)
        for i, j in credited.pairs
    ]


def test_best_and_worst_of_a_group_are_its_pair_the_first_of_equals():
    groups = [distinct(make_group("a", [0.5, 1.0, 0.0, 1.0, 0.0])), distinct(make_group("b", [0.2, 0.1]))]

    found = paired(groups)

    assert names(found) == [("a", 1, 2), ("b", 0, 1)]
    assert len(found.samples) == 4  # nothing else is forwarded
    assert found.metrics == {"pairs/num": 2.0, "pairs/reward_gap": pytest.approx((1.0 + 0.1) / 2)}


def test_all_takes_every_two_that_differ_by_the_gap():
    group = distinct(make_group("a", [0.0, 0.4, 1.0]))

    assert names(paired([group], ALL)) == [("a", 1, 0), ("a", 2, 0), ("a", 2, 1)]
    assert names(paired([group], PairsConfig(choice="all", min_gap=0.6))) == [("a", 2, 0), ("a", 2, 1)]
    assert names(paired([group], PairsConfig(choice="all", min_gap=1.1))) == []
    assert names(paired([group], PairsConfig(choice="best_worst", min_gap=1.1))) == []


def test_equal_rewards_and_equal_completions_make_no_pair_and_count_as_no_signal():
    groups = [distinct(make_group("a", [1.0, 1.0])), make_group("b", [1.0, 0.0]), distinct(make_group("c", [1.0, 0.0]))]

    found = paired(groups)

    assert names(found) == [("c", 0, 1)] and found.num_no_signal_groups == 2 and found.has_signal
    assert not paired(groups[:2]).has_signal


def test_rounding_neither_makes_a_pair_nor_hides_one():
    tokens = [(1,), (2,)]

    assert choose_pairs([0.1 + 0.2, 0.3], tokens, ALL) == choose_pairs([0.3, 0.1 + 0.2], tokens, BEST) == []
    assert 0.3 - 0.1 < 0.2
    assert choose_pairs([0.3, 0.1], tokens, PairsConfig(choice="best_worst", min_gap=0.2)) == [(0, 1)]
    assert choose_pairs([0.3, 0.1], tokens, PairsConfig(choice="best_worst", min_gap=0.2 + 1e-9)) == []


def test_an_equal_best_completion_does_not_hide_a_pair():
    assert choose_pairs([1.0, 0.0, 0.5], [(1,), (1,), (2,)], BEST) in ([(0, 2)], [(2, 1)])


def test_rollouts_without_reward_are_in_no_pair_and_too_many_stop_the_run():
    group = distinct(make_group("a", [None, 1.0, 0.5]))

    found = paired([group], ALL, RewardsConfig(max_invalid_frac=0.5))

    assert names(found) == [("a", 1, 2)] and found.num_invalid_rollouts == 1
    with pytest.raises(RewardFailure, match="1 of 3 rollouts have no reward"):
        paired([group], ALL)


def test_truncated_completions_can_be_left_out_and_long_ones_pay():
    group = distinct(make_group("a", [1.0, 0.5, 0.0]))
    cut = replace(group.rollouts[0].completion, finish_reason=FINISH_LENGTH)
    group = replace(group, rollouts=(replace(group.rollouts[0], completion=cut), *group.rollouts[1:]))
    long = replace(group.rollouts[1].completion, token_ids=(1,) * 7 + (11,))
    lengthy = replace(group, rollouts=(group.rollouts[2], replace(group.rollouts[1], completion=long)))

    assert names(paired([group], mask_truncated=True)) == [("a", 1, 2)]
    assert names(paired([lengthy])) == [("a", 1, 2)]
    # 8 of at most 8 tokens: the penalty of 1 turns the pair round
    assert names(paired([lengthy], overlong_buffer_tokens=4)) == [("a", 2, 1)]


def test_dynamic_sampling_asks_for_groups_with_a_pair():
    config = AlgorithmConfig(pairs=PairsConfig(choice="best_worst", min_gap=0.5))

    def useful(rewards):
        return has_pair(distinct(make_group("a", rewards)), config, RewardsConfig(), max_completion_tokens=LIMIT)

    assert useful([0.0, 0.5]) and not useful([0.0, 0.4])
