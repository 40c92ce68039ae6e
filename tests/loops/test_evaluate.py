"""Numbers of sampled answers to held-out problems."""

from dataclasses import replace

import pytest

from rlbench.loops.evaluate import sampled_metrics
from rlbench.records import Completion, Prompt, RewardComponent, Rollout, RolloutGroup


def group(name: str, *values: float | None) -> RolloutGroup:
    """None is a broken verifier."""
    prompt = Prompt(prompt_id=name, text="", token_ids=(1,))
    completion = Completion(
        token_ids=(2,), sampling_logprobs=(-1.0,), finish_reason="stop", seed=0, policy_version=0,
        adapter_fingerprint="base",
    )  # fmt: skip
    parts = [RewardComponent(status="error" if v is None else "value", value=v, weight=1.0) for v in values]
    rollouts = (
        Rollout(
            rollout_id=f"0/{name}/{i}", prompt=prompt, completion=completion, completion_text="", sample_index=i,
            components={"accuracy": part}, reward=part.value,
        )
        for i, part in enumerate(parts)
    )  # fmt: skip
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))


def test_accuracy_and_pass_at_k_by_hand():
    metrics = sampled_metrics([group("a", 1, 0, 0, 0), group("b", 0, 0, 0, 0), group("c", 1, 1, 1, 0.5)])

    assert metrics["eval/sampled_accuracy"] == pytest.approx((1 / 4 + 0 + 3 / 4) / 3)
    assert metrics["eval/pass_at_4"] == pytest.approx(2 / 3)
    assert 0 < metrics["eval/pass_at_4_low"] < 2 / 3 < metrics["eval/pass_at_4_high"] < 1


def test_a_problem_whose_verifier_broke_is_left_out():
    metrics = sampled_metrics([group("a", 1, 1), group("b", 0, None)])

    assert metrics["eval/pass_at_2"] == 1.0
    assert not sampled_metrics([group("b", None, None)])


def test_without_accuracy_there_are_no_numbers():
    (rollout,) = group("a", 1).rollouts
    named = replace(rollout, components={"style": rollout.components["accuracy"]})

    assert sampled_metrics([RolloutGroup(prompt=named.prompt, rollouts=(named,))]) == {}
