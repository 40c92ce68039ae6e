"""Successes are kept, aged, and put into groups without one, and nothing about them changes on the way."""

import json
from dataclasses import replace

import pytest

from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.replay import ReplayConfig, check_prompts_return
from rlbench.config.schema import RewardsConfig
from rlbench.data.success_memory import SuccessMemory, replayed
from rlbench.records import Completion, Prompt, RewardComponent, Rollout, RolloutGroup
from rlbench.rollouts.credit import credit

PROMPTS = [Prompt(prompt_id=f"train/{i}", text="", token_ids=(i + 1,)) for i in range(4)]


def memory(keeps_truncated=True, **options) -> SuccessMemory:
    config = ReplayConfig(is_on=True, **options)
    return SuccessMemory(PROMPTS, config, component_names=["accuracy"], keeps_truncated=keeps_truncated)


def group(prompt: int, *values: float | None, version: int = 0, finish_reason: str = "stop") -> RolloutGroup:
    """Tokens and logprobs say which completion it is."""
    rollouts = tuple(
        Rollout(
            rollout_id=f"{version + 1}/train/{prompt}/{i}", prompt=PROMPTS[prompt], completion_text=f"{version} {i}",
            sample_index=i, reward=value,
            completion=Completion(
                token_ids=(version + 5, i + 5), sampling_logprobs=(-0.1 - version, -1 / 3), finish_reason=finish_reason,
                seed=100 * version + i, policy_version=version, adapter_fingerprint=f"adapter {version}",
            ),
            components={
                "accuracy": RewardComponent(
                    status="error" if value is None else "value", value=value, weight=1.0, details={"read": {1, 2}}
                )
            },
        )
        for i, value in enumerate(values)
    )  # fmt: skip
    return RolloutGroup(prompt=PROMPTS[prompt], rollouts=rollouts)


def totals(group):
    return [components["accuracy"].value for components in group]


def mixed(one: SuccessMemory, found: RolloutGroup, version: int) -> RolloutGroup:
    return one.mix([found], policy_version=version, totals=totals)[0]


def test_a_success_takes_the_last_place_of_a_group_without_one_and_stays_what_it_is():
    one = memory()
    first = group(0, 0.0, 1.0, 0.0)
    one.observe([first], policy_version=1)
    fresh = group(0, 0.0, 0.0, 0.0, version=7)

    found = mixed(one, fresh, 7)

    assert found.rollouts[:2] == fresh.rollouts[:2] and len(found.rollouts) == 3
    success = found.rollouts[2]
    assert success.replay_age == 7 and success.reward == 1.0 and replayed(found) == [success]
    assert success.completion == first.rollouts[1].completion
    assert (success.rollout_id, success.completion_text) == ("1/train/0/1", "0 1")


def test_the_group_then_teaches():
    one, algorithm = memory(), AlgorithmConfig(replay=ReplayConfig(is_on=True))
    one.observe([group(0, 1.0, 0.0, 0.0)], policy_version=1)
    fresh = group(0, 0.0, 0.0, 0.0, version=1)

    without, with_success = (credit([g], algorithm, RewardsConfig()) for g in (fresh, mixed(one, fresh, 1)))

    assert not without.has_signal and with_success.has_signal
    assert [sample.is_replayed for sample in with_success.samples] == [False, False, True]
    assert with_success.samples[2].sampling_logprobs == (
        -0.1,
        -1 / 3,
    )  # of the policy that sampled: the importance ratio
    advantages = [sample.advantages[0] for sample in with_success.samples]
    assert advantages[2] > 0 > advantages[0] == advantages[1] and sum(advantages) == pytest.approx(0)


@pytest.mark.parametrize(
    "values", [(0.0, 1.0, 0.0), (0.0, None, 0.0)], ids=["holds a right answer", "a verifier broke"]
)
def test_other_groups_stay(values):
    one = memory()
    one.observe([group(0, 1.0)], policy_version=1)
    fresh = group(0, *values, version=1)

    assert mixed(one, fresh, 1) == fresh


def test_a_group_in_which_another_reward_broke_stays_so_that_the_failure_is_counted():
    one = memory()
    one.observe([group(0, 1.0)], policy_version=1)
    fresh = group(0, 0.0, 0.0, version=1)
    fresh = replace(fresh, rollouts=(fresh.rollouts[0], replace(fresh.rollouts[1], reward=None)))

    assert mixed(one, fresh, 1) == fresh


def test_successes_of_other_prompts_are_not_taken():
    one = memory()
    one.observe([group(0, 1.0)], policy_version=1)
    fresh = group(1, 0.0, 0.0, version=1)

    assert mixed(one, fresh, 1) == fresh


def test_what_is_too_old_is_not_replayed_and_forgotten():
    one = memory(max_age=3)
    one.observe([group(0, 1.0, version=2)], policy_version=3)

    assert replayed(mixed(one, group(0, 0.0, 0.0, version=5), 5))[0].replay_age == 3
    assert not replayed(mixed(one, group(0, 0.0, 0.0, version=6), 6))
    one.observe([], policy_version=5)
    assert one.state()
    one.observe([], policy_version=6)
    assert not one.state()


def test_the_newest_of_a_prompt_are_kept_and_equal_tokens_once():
    one = memory(num_per_group=2)
    for version in range(3):
        one.observe([group(0, 1.0, version=version)], policy_version=version + 1)
    again = replace(group(0, 1.0, version=2).rollouts[0], rollout_id="9/train/0/0")
    again = replace(again, completion=replace(again.completion, policy_version=8, sampling_logprobs=(-0.2, -0.3)))
    one.observe([RolloutGroup(prompt=PROMPTS[0], rollouts=(again,))], policy_version=9)

    found = replayed(mixed(one, group(0, 0.0, 0.0, 0.0, version=9), 9))

    assert [(r.completion.policy_version, r.completion.token_ids[0]) for r in found] == [(1, 6), (8, 7)]
    assert found[1].completion.sampling_logprobs == (-0.2, -0.3)


def test_one_completion_of_the_present_policy_always_stays():
    one = memory(num_per_group=3)
    one.observe([group(0, 1.0, 1.0, 1.0)], policy_version=1)

    found = mixed(one, group(0, 0.0, 0.0, version=1), 1)

    assert [r.replay_age for r in found.rollouts] == [None, 1]


def test_prompts_that_were_answered_longest_ago_go_first():
    one = memory(max_prompts=2)
    one.observe([group(0, 1.0), group(1, 1.0)], policy_version=1)
    one.observe([group(0, 1.0, version=1), group(2, 1.0, version=1)], policy_version=2)

    assert list(one.state()) == ["train/0", "train/2"]


def test_completions_that_are_not_trained_on_are_not_kept():
    one = memory(keeps_truncated=False)
    one.observe([group(0, 1.0, finish_reason="length"), group(1, 1.0)], policy_version=1)

    assert list(one.state()) == ["train/1"]


def test_a_completion_without_tokens_is_not_kept():
    one = memory()
    found = group(0, 1.0)
    empty = replace(found.rollouts[0].completion, token_ids=(), sampling_logprobs=())
    one.observe([replace(found, rollouts=(replace(found.rollouts[0], completion=empty),))], policy_version=1)

    assert not one.state()


def test_rewards_of_a_group_are_made_anew():
    """With rewards.combine=normalised_sum a reward depends on the others of its group."""
    one = memory()
    one.observe([group(0, 1.0, 0.0)], policy_version=1)

    (found,) = one.mix(
        [group(0, 0.0, 0.0, version=1)],
        policy_version=1,
        totals=lambda of_group: [c["accuracy"].value - sum(d["accuracy"].value for d in of_group) for c in of_group],
    )

    assert [r.reward for r in found.rollouts] == [-1.0, 0.0]


def test_a_restored_memory_is_the_same_to_the_last_bit():
    one, other = memory(num_per_group=2), memory(num_per_group=2)
    one.observe([group(0, 1.0, 1.0), group(3, 0.0, 1.0)], policy_version=1)
    one.observe([group(1, 1.0, version=1)], policy_version=2)

    other.restore(json.loads(json.dumps(one.state())))

    assert other.state() == one.state() and list(other.state()) == list(one.state())
    fresh = [group(i, 0.0, 0.0, 0.0, version=2) for i in range(4)]
    assert other.mix(fresh, policy_version=2, totals=totals) == one.mix(fresh, policy_version=2, totals=totals)
    assert sum(len(replayed(g)) for g in other.mix(fresh, policy_version=2, totals=totals)) == 4


def test_successes_that_other_rewards_found_are_forgotten():
    one = memory()
    one.observe([group(0, 1.0)], policy_version=1)
    other = SuccessMemory(
        PROMPTS, ReplayConfig(is_on=True), component_names=["accuracy", "format"], keeps_truncated=True
    )

    other.restore(one.state())

    assert not other.state()


def test_metrics_count_what_was_replayed_and_how_old_it_is():
    one = memory()
    one.observe([group(0, 1.0), group(1, 1.0, version=1)], policy_version=2)
    found = one.mix([group(i, 0.0, 0.0, version=4) for i in range(4)], policy_version=4, totals=totals)

    assert one.metrics(found) == {
        "replay/num_rollouts": 2.0, "replay/groups_frac": 0.5, "replay/num_stored": 2.0, "replay/age_mean": 3.5,
        "replay/age_max": 4.0,
    }  # fmt: skip


REFUSED = {
    "no correction": ({"importance": "off"}, "algorithm.importance is off, but algorithm.replay.is_on is true"),
    "a penalty": ({"kl_coef": 0.02}, "algorithm.kl_coef is 0.02, but algorithm.replay.is_on is true"),
    "a critic": ({"advantage": "gae"}, "algorithm.advantage=gae judges each token"),
    "a teacher": ({"advantage": "teacher"}, "algorithm.advantage=teacher judges each token"),
    "nothing fresh": ({"group_size": 2, "num_per_group": 2}, "replay.num_per_group is 2, expected less than algorithm"),
    "age": ({"max_age": 0}, "algorithm.replay.max_age is 0, expected at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_is_one_sentence(case):
    options, sentence = REFUSED[case]
    own = {name: value for name, value in options.items() if name in ("num_per_group", "max_age")}
    others = {name: value for name, value in options.items() if name not in own}

    with pytest.raises(ValueError, match=sentence) as error:
        AlgorithmConfig(replay=ReplayConfig(is_on=True, **own), **others)

    assert "\n" not in str(error.value) and "expected" in str(error.value)


def test_a_loss_that_weighs_the_sampler_needs_no_other_correction():
    assert AlgorithmConfig(loss="vespo", replay=ReplayConfig(is_on=True)).importance_method == "off"


def test_prompts_must_return():
    algorithm = AlgorithmConfig(prompts_per_step=4, num_updates=2, replay=ReplayConfig(is_on=True, max_age=16))

    with pytest.raises(ValueError, match="10 steps .* draw none of 40 prompts a second time"):
        check_prompts_return(algorithm, 40, 10)
    assert "returns after 20 updates on average, but algorithm.replay.max_age is 16" in check_prompts_return(
        algorithm, 40, 11
    )
    assert check_prompts_return(algorithm, 32, 11) == ""
