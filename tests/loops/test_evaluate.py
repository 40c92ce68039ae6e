"""Numbers of sampled answers to held-out problems."""

import io
from dataclasses import replace

import pytest

from rlbench.loops.evaluate import sampled_metrics, sampled_shares, sampled_text
from rlbench.records import Completion, Prompt, RewardComponent, Rollout, RolloutGroup
from rlbench.tracking.console import RunConsole
from tests.loops.test_algorithm_families import finish, short, start  # noqa: F401 (short is a fixture)


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
    groups = [group("a", 1, 0, 0, 0), group("b", 0, 0, 0, 0), group("c", 1, 1, 1, 0.5)]
    metrics = sampled_metrics(sampled_shares(groups), 4)

    assert metrics["eval/sampled_accuracy"] == pytest.approx((1 / 4 + 0 + 3 / 4) / 3)
    assert metrics["eval/pass_at_4"] == pytest.approx(2 / 3)
    assert 0 < metrics["eval/pass_at_4_low"] < 2 / 3 < metrics["eval/pass_at_4_high"] < 1


def test_a_problem_whose_verifier_broke_is_left_out():
    metrics = sampled_metrics(sampled_shares([group("a", 1, 1), group("b", 0, None)]), 2)

    assert metrics["eval/pass_at_2"] == 1.0
    assert not sampled_metrics(sampled_shares([group("b", None, None)]), 2)


def test_without_accuracy_there_are_no_numbers():
    (rollout,) = group("a", 1).rollouts
    named = replace(rollout, components={"style": rollout.components["accuracy"]})

    shares = sampled_shares([RolloutGroup(prompt=named.prompt, rollouts=(named,))])
    assert shares == {} and sampled_metrics(shares, 1) == {} and sampled_text({}, 1) == ""


def test_the_change_of_sampled_accuracy_is_taken_problem_by_problem():
    # differences 0.5, 0, 0.25, on the problems that both have: mean 0.25, variance 0.0625, so +- 1.96 * 0.25 / sqrt(3)
    first, last = {"a": 0.5, "b": 0.5, "c": 0.0, "d": 1.0}, {"c": 0.25, "b": 0.5, "a": 1.0}
    metrics = sampled_metrics(last, 4, first)

    assert metrics["eval/sampled_change"] == pytest.approx(0.25)
    assert metrics["eval/sampled_change_low"] == pytest.approx(0.25 - 0.282902, abs=1e-5)
    assert metrics["eval/sampled_change_high"] == pytest.approx(0.25 + 0.282902, abs=1e-5)
    assert sampled_text(metrics, 4).endswith("+25.0 points (95% -3.3 to +53.3, on the same problems)")
    assert "eval/sampled_change" not in sampled_metrics(last, 4)


def test_an_evaluation_whose_output_is_a_file_says_how_far_it_is(short, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("rlbench.tracking.console.PLAIN_PROGRESS_EVERY_S", 0.0)
    options = ["evaluation.num_prompts=8", "evaluation.num_samples=2", "training.num_steps=1"]
    loop, output = start(short, tmp_path / "run", *options), io.StringIO()
    loop.console = RunConsole(is_terminal=False, file=output)

    finish(loop)

    for greedy in range(1, 9):
        assert output.getvalue().count(f"evaluation {greedy}/8 answers") == 2  # before and after the step
    assert output.getvalue().count("evaluation 16/16 answers") == 2
