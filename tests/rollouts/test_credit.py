"""Credit: what is trained on, what is left out, what stops the run. And seeds."""

from dataclasses import replace

import pytest

from rlbench.algorithms import ADVANTAGES
from rlbench.config.pairs import PairsConfig
from rlbench.config.schema import AlgorithmConfig, RewardsConfig
from rlbench.config.teacher import TeacherConfig
from rlbench.records import Completion, Prompt, RewardComponent, Rollout, RolloutGroup, StateValues
from rlbench.rollouts.credit import RewardFailure, credit, has_signal
from rlbench.rollouts.pairs import pair_up
from rlbench.rollouts.seeds import sampling_seed


def make_group(name: str, rewards: list[float | None]) -> RolloutGroup:
    prompt = Prompt(prompt_id=name, text="?", token_ids=(1, 2))
    rollouts = tuple(
        Rollout(
            rollout_id=f"1/{name}/{i}",
            prompt=prompt,
            completion=Completion(
                token_ids=(3, 4, 5),
                sampling_logprobs=(-1.0, -2.0, -3.0),
                finish_reason="stop",
                seed=i,
                policy_version=0,
                adapter_fingerprint="f",
            ),
            completion_text="",
            sample_index=i,
            components={
                "accuracy": RewardComponent(
                    status="value" if r is not None else "timeout", value=r, weight=1.0, message="m"
                )
            },
            reward=r,
        )
        for i, r in enumerate(rewards)
    )
    return RolloutGroup(prompt=prompt, rollouts=rollouts)


def test_groups_without_signal_are_counted_and_stay_in_the_denominators():
    groups = [make_group("a", [1.0, 1.0]), make_group("b", [0.0, 0.0]), make_group("c", [1.0, 0.0])]

    result = credit(groups, AlgorithmConfig(advantage_scale="none"), RewardsConfig())

    assert result.num_no_signal_groups == 2 and result.has_signal
    assert [s.group_id for s in result.samples] == ["a", "a", "b", "b", "c", "c"]
    assert [s.advantages for s in result.samples[4:]] == [(0.5,) * 3, (-0.5,) * 3]
    assert {s.advantages for s in result.samples[:4]} == {(0.0,) * 3}
    assert result.advantages["1/a/0"] == 0.0


def test_with_dynamic_sampling_groups_without_signal_are_left_out():
    groups = [make_group("a", [1.0, 1.0]), make_group("c", [1.0, 0.0])]

    result = credit(groups, AlgorithmConfig(max_refills=2), RewardsConfig())

    assert [s.group_id for s in result.samples] == ["c", "c"]
    assert result.num_no_signal_groups == 1 and set(result.advantages) == {"1/a/0", "1/a/1", "1/c/0", "1/c/1"}


def test_no_signal_anywhere():
    assert not credit([make_group("a", [1.0, 1.0])], AlgorithmConfig(), RewardsConfig()).has_signal


def test_a_rollout_without_reward_is_dropped_and_does_not_count_as_zero():
    rewards = RewardsConfig(max_invalid_frac=0.5)

    result = credit([make_group("a", [1.0, None, 0.5])], AlgorithmConfig(advantage_scale="none"), rewards)

    assert result.num_invalid_rollouts == 1
    assert [s.advantages[0] for s in result.samples] == [0.25, -0.25]
    assert "1/a/1" not in result.advantages


def test_the_whole_group_can_be_dropped():
    rewards = RewardsConfig(on_invalid="drop_group", max_invalid_frac=1.0)

    result = credit([make_group("a", [1.0, None, 0.5])], AlgorithmConfig(), rewards)

    assert result.samples == () and result.num_no_signal_groups == 1


@pytest.mark.parametrize("options", [{"on_invalid": "stop"}, {"max_invalid_frac": 0.2}])
def test_too_many_invalid_rollouts_stop_the_run(options):
    with pytest.raises(RewardFailure, match=r"1 of 3 rollouts have no reward .* 1/a/1: accuracy ended in timeout: m"):
        credit([make_group("a", [1.0, None, 0.5])], AlgorithmConfig(), RewardsConfig(**options))


def test_rollouts_to_which_no_reward_applies_say_so():
    group = make_group("a", [None])
    skipped = RewardComponent(status="skipped", value=None, weight=1.0)
    group = replace(group, rollouts=(replace(group.rollouts[0], components={"accuracy": skipped}),))

    with pytest.raises(RewardFailure, match=r"accuracy returned None \(it does not apply to the row\), and no other"):
        credit([group], AlgorithmConfig(), RewardsConfig())


def test_a_negative_reward_stops_a_run_whose_advantage_is_not_defined_there():
    group = make_group("a", [1.0, -0.5])

    with pytest.raises(RewardFailure, match=r"advantage is maxrl, but the reward of 1/a/1 is -0.5; expected rewards"):
        credit([group], AlgorithmConfig(advantage="maxrl"), RewardsConfig())
    assert credit([group], AlgorithmConfig(), RewardsConfig()).has_signal


def test_one_valid_rollout_has_nothing_to_be_compared_with():
    result = credit([make_group("a", [1.0, None])], AlgorithmConfig(), RewardsConfig(max_invalid_frac=1.0))

    assert result.samples == () and result.num_no_signal_groups == 1


def emptied(group: RolloutGroup, *places: int) -> RolloutGroup:
    """With completions that have no tokens at these places."""
    rollouts = [
        replace(r, completion=replace(r.completion, token_ids=(), sampling_logprobs=())) if i in places else r
        for i, r in enumerate(group.rollouts)
    ]
    return replace(group, rollouts=tuple(rollouts))


def without(group: RolloutGroup, *places: int) -> RolloutGroup:
    return replace(group, rollouts=tuple(r for i, r in enumerate(group.rollouts) if i not in places))


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_completions_without_tokens_are_left_out_and_change_nothing_for_others(advantage):
    first, second = make_group("a", [1.0, 0.0, 0.0, 0.5]), make_group("b", [0.0, 1.0])
    config = AlgorithmConfig(advantage=advantage)
    of_tokens = {r.rollout_id: len(r.completion.token_ids) for g in (emptied(first, 1), second) for r in g.rollouts}
    options = {
        "gae": {"state_values": {i: StateValues(values=(0.1,) * n, last=0.2) for i, n in of_tokens.items()}},
        "teacher": {"teacher_gaps": {i: [0.3, -0.2, 0.1][:n] for i, n in of_tokens.items()}},
    }.get(advantage, {})

    found = credit([emptied(first, 1), second], config, RewardsConfig(), **options)
    expected = credit([without(first, 1), second], config, RewardsConfig(), **options)

    assert found.samples == expected.samples and len(found.samples) == 5
    assert found.advantages == expected.advantages and "1/a/1" not in found.advantages


def test_a_group_of_empty_completions_has_no_signal_and_none_of_them_is_invalid():
    group = emptied(make_group("a", [1.0, 0.0, 0.5]), 0, 1)

    result = credit([group], AlgorithmConfig(), RewardsConfig(on_invalid="drop_group", max_invalid_frac=0.0))

    assert (result.samples, result.num_no_signal_groups, result.num_invalid_rollouts) == ((), 1, 0)
    assert not has_signal(group, AlgorithmConfig(), RewardsConfig(), max_completion_tokens=8)


def test_an_empty_completion_beside_two_others_does_not_drop_its_group():
    result = credit(
        [emptied(make_group("a", [1.0, 0.0, 0.5]), 2)], AlgorithmConfig(), RewardsConfig(on_invalid="drop_group")
    )

    assert len(result.samples) == 2


def test_a_completion_without_tokens_is_in_no_pair():
    config = AlgorithmConfig(pairs=PairsConfig(choice="all"))
    first, second = make_group("a", [1.0, 0.0, 0.5]), make_group("b", [1.0, 0.0])
    second = replace(second, rollouts=(finished_after(second, 2, 2).rollouts[0], second.rollouts[1]))

    result = pair_up([emptied(first, 0, 1), second], config, RewardsConfig(), max_completion_tokens=8)

    assert result.pairs == ((0, 1),) and [len(s.token_ids) for s in result.samples] == [2, 3]


def finished_after(group: RolloutGroup, *num_tokens: int, reason: str = "length") -> RolloutGroup:
    rollouts = tuple(
        replace(
            r, completion=replace(r.completion, token_ids=(3,) * n, sampling_logprobs=(-1.0,) * n, finish_reason=reason)
        )
        for r, n in zip(group.rollouts, num_tokens, strict=True)
    )
    return replace(group, rollouts=rollouts)


def test_truncated_completions_are_compared_but_not_trained_on():
    group = make_group("a", [1.0, 0.0])
    cut = replace(group, rollouts=(group.rollouts[0], finished_after(group, 3, 3).rollouts[1]))

    masked = credit([cut], AlgorithmConfig(mask_truncated=True), RewardsConfig())
    kept = credit([cut], AlgorithmConfig(), RewardsConfig())

    assert [s.loss_mask for s in masked.samples] == [(True,) * 3, (False,) * 3]
    assert [s.loss_mask for s in kept.samples] == [(True,) * 3] * 2
    assert [s.advantages for s in masked.samples] == [s.advantages for s in kept.samples]
    assert masked.metrics["rollouts/masked_frac"] == 0.5


def test_long_completions_lose_reward_before_they_are_compared():
    config = AlgorithmConfig(overlong_buffer_tokens=4, overlong_penalty=0.5, advantage_scale="none")
    group = finished_after(make_group("a", [1.0, 1.0]), 6, 8)

    result = credit([group], config, RewardsConfig(), max_completion_tokens=8)

    assert [s.advantages[0] for s in result.samples] == pytest.approx([0.125, -0.125])  # penalties 0.25, 0.5
    assert result.metrics["completion/overlong_penalty_mean"] == pytest.approx(-0.375)
    assert has_signal(group, config, RewardsConfig(), max_completion_tokens=8)
    assert not has_signal(group, AlgorithmConfig(), RewardsConfig(), max_completion_tokens=8)


def test_the_penalty_on_long_completions_is_1_unless_it_is_set():
    config = AlgorithmConfig(overlong_buffer_tokens=4, advantage_scale="none")
    group = finished_after(make_group("a", [1.0, 1.0]), 4, 8)

    result = credit([group], config, RewardsConfig(), max_completion_tokens=8)

    assert [s.advantages[0] for s in result.samples] == pytest.approx([0.5, -0.5])


def test_the_penalty_on_long_completions_is_a_reward_of_its_own_for_gdpo():
    config = AlgorithmConfig(overlong_buffer_tokens=4, advantage="gdpo")
    group = finished_after(make_group("a", [1.0, 1.0]), 4, 8)

    result = credit([group], config, RewardsConfig(), max_completion_tokens=8)

    assert [s.advantages[0] > 0 for s in result.samples] == [True, False]
    assert result.num_no_signal_groups == 0


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_the_discount_of_a_teacher_is_that_of_the_settings(gamma):
    config = AlgorithmConfig(advantage="teacher", teacher=TeacherConfig(gamma=gamma))
    gaps = {"1/a/0": [0.1, 0.2, 0.4]}

    result = credit([make_group("a", [0.0])], config, RewardsConfig(), teacher_gaps=gaps)

    expected = [-0.1 - gamma * 0.2 - gamma**2 * 0.4, -0.2 - gamma * 0.4, -0.4]
    assert result.samples[0].advantages == pytest.approx(expected)


KL = {"1/a/0": [0.1, 0.2, 0.3], "1/a/1": [0.0, 0.0, 0.0]}


def test_a_kl_penalty_in_the_reward_is_the_sum_over_the_completion():
    config = AlgorithmConfig(advantage="leave_one_out", kl_coef=0.5, kl_in="reward", kl="k1")

    result = credit([make_group("a", [1.0, 0.0])], config, RewardsConfig(), token_kl=KL)

    assert [s.advantages[0] for s in result.samples] == pytest.approx([0.7, -0.7])
    assert result.metrics["kl/reference"] == pytest.approx(0.1)


def test_reinforce_plus_plus_charges_each_token_for_what_comes_after_it():
    config = AlgorithmConfig(advantage="reinforce_plus_plus", kl_coef=0.5, kl_in="reward", kl="k1")

    result = credit([make_group("a", [1.0, 0.0])], config, RewardsConfig(), token_kl=KL)

    first, second = (s.advantages for s in result.samples)
    assert first[0] < first[1] < first[2] and len(set(second)) == 1
    # returns 0.7, 0.75, 0.85 and 0 three times: differences keep their proportions
    assert (first[1] - first[0]) / (first[0] - second[0]) == pytest.approx(0.05 / 0.7)


def test_one_completion_a_prompt_suffices_without_a_baseline_of_the_group():
    config = AlgorithmConfig(advantage="reinforce_plus_plus", group_size=1)

    result = credit([make_group("a", [1.0]), make_group("b", [0.0])], config, RewardsConfig())

    assert [s.advantages[0] > 0 for s in result.samples] == [True, False]


def test_gdpo_reads_each_reward_apart():
    group = make_group("a", [1.0, 1.0])
    rollouts = tuple(
        replace(r, components={"x": reward(value), "y": reward(1 - value)})
        for r, value in zip(group.rollouts, (0.0, 1.0), strict=True)
    )
    group = replace(group, rollouts=rollouts)

    assert not has_signal(group, AlgorithmConfig(), RewardsConfig(), max_completion_tokens=8)
    assert has_signal(group, AlgorithmConfig(advantage="gdpo"), RewardsConfig(), max_completion_tokens=8)


def reward(value: float | None) -> RewardComponent:
    return RewardComponent(status="skipped" if value is None else "value", value=value, weight=1.0)


def test_a_reward_that_does_not_apply_to_a_rollout_costs_it_nothing_in_gdpo():
    group = make_group("a", [1.9, 1.7, 1.0])
    components = [{"x": reward(x), "y": reward(1.0)} for x in (0.9, 0.7, None)]
    rollouts = tuple(replace(r, components=c) for r, c in zip(group.rollouts, components, strict=True))

    result = credit([replace(group, rollouts=rollouts)], AlgorithmConfig(advantage="gdpo"), RewardsConfig())

    assert [s.advantages[0] for s in result.samples] == pytest.approx([1.0, -1.0, 0.0], abs=1e-3)


@pytest.mark.parametrize("rewards", [[0.1 + 0.2, 0.3], [0.3, 0.1 + 0.2]])
def test_rewards_that_only_rounding_tells_apart_are_no_signal(rewards):
    group, config = make_group("a", rewards), AlgorithmConfig(max_refills=1)

    assert not has_signal(group, config, RewardsConfig(), max_completion_tokens=8)
    assert credit([group], config, RewardsConfig()).num_no_signal_groups == 1
    assert has_signal(make_group("a", [0.3, 0.3 + 1e-9]), config, RewardsConfig(), max_completion_tokens=8)


@pytest.mark.parametrize(
    ("options", "is_trained"),
    [
        ({"kl_coef": 0.1}, True),
        ({"entropy_coef": 0.01}, True),
        ({"entropy_target": 0.5}, True),
        ({"kl_coef": 0.1, "kl_in": "reward", "kl": "k1", "advantage": "leave_one_out"}, False),
        ({"kl_coef": 0.1, "max_refills": 1}, False),  # dynamic sampling leaves the groups out
        ({}, False),
    ],
)
def test_kl_in_the_loss_and_entropy_act_on_a_step_whose_rewards_are_all_equal(options, is_trained):
    result = credit([make_group("a", [1.0, 1.0])], AlgorithmConfig(**options), RewardsConfig())

    assert result.has_signal == is_trained and result.num_no_signal_groups == 1


def test_a_step_of_masked_completions_has_nothing_to_train_on_whatever_the_terms():
    config = AlgorithmConfig(mask_truncated=True, kl_coef=0.1)

    assert not credit([finished_after(make_group("a", [1.0, 0.0]), 3, 3)], config, RewardsConfig()).has_signal


def test_sampling_seeds_depend_on_every_part_and_on_nothing_else():
    seeds = {
        sampling_seed(r, s, p, i) for r in range(3) for s in range(3) for p in ("train/1", "train/2") for i in range(4)
    }

    assert len(seeds) == 3 * 3 * 2 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sampling_seed(0, 1, "train/1", 0) == sampling_seed(0, 1, "train/1", 0)
    # Pinned: a change would make recorded runs impossible to replay.
    assert sampling_seed(7, 3, "train/17", 2) == PINNED


PINNED = 9218099565167482000
