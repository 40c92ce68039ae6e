"""Metrics of rollouts, hand-computed."""

import pytest

from rlbench.records import RewardComponent
from rlbench.tracking.metrics import component_names, has_no_signal, metric_spec, summarise_rollouts


def value(v, weight=1.0):
    return RewardComponent(status="value", value=v, weight=weight)


def broken(status):
    return RewardComponent(status=status, value=None, weight=1.0)


def test_rollouts_are_summarised_as_computed_by_hand(rollout, group):
    groups = [
        group(
            rollout(0, components={"accuracy": value(1.0), "format": value(0.5)}, reward=1.5, num_tokens=2),
            rollout(1, components={"accuracy": value(0.0), "format": value(0.5)}, reward=0.5, num_tokens=4),
        ),
        group(
            rollout(0, components={"accuracy": broken("error"), "format": value(0.2)}, reward=None, num_tokens=6),
            rollout(
                1,
                components={"accuracy": broken("timeout"), "format": broken("error")},
                reward=None,
                num_tokens=8,
                finish_reason="length",
            ),
        ),
    ]

    metrics = summarise_rollouts(groups)

    assert metrics == pytest.approx(
        {
            "groups/num": 2,
            "groups/no_signal_frac": 0.5,
            "reward/mean": 1.0,
            "reward/std": 0.5,
            "reward/accuracy": 0.5,
            "reward/format": 0.4,
            "reward/error_frac": 0.5,
            "reward/timeout_frac": 0.25,
            "completion/length_tokens_mean": 5,
            "completion/length_tokens_min": 2,
            "completion/length_tokens_max": 8,
            "completion/truncated_frac": 0.25,
            "completion/num_tokens": 20,
            "accuracy/train": 0.5,
        }
    )


def test_without_observations_keys_are_absent_not_nan(rollout, group):
    assert summarise_rollouts([]) == {"groups/num": 0, "completion/num_tokens": 0}
    metrics = summarise_rollouts([group(rollout(components={"accuracy": broken("error")}, reward=None))])
    assert "reward/mean" not in metrics and "reward/accuracy" not in metrics
    assert metrics["reward/error_frac"] == 1 and metrics["groups/no_signal_frac"] == 1


def test_a_group_has_a_signal_only_with_two_different_rewards(rollout, group):
    assert has_no_signal(group(rollout(0, reward=1.0), rollout(1, reward=None)))
    assert has_no_signal(group(rollout(0, reward=0.1 + 0.2), rollout(1, reward=0.3)))
    assert not has_no_signal(group(rollout(0, reward=0.0), rollout(1, reward=1.0), rollout(2, reward=None)))


def test_a_reward_named_like_a_metric_of_the_whole_reward_is_refused(rollout, group):
    with pytest.raises(ValueError, match="'mean'"):
        summarise_rollouts([group(rollout(components={"mean": value(1.0)}))])


def test_families_of_keys_are_described():
    assert metric_spec("reward/format").label == "reward component format"
    assert (metric_spec("time/generation_s").label, metric_spec("time/generation_s").unit) == (
        "time in generation",
        "s",
    )
    assert metric_spec("reward/mean").better == "higher"
    assert metric_spec("own/key").label == "own/key"


def test_component_names_leave_out_metrics_of_the_whole_reward():
    keys = ["reward/mean", "reward/format", "loss/policy", "reward/error_frac", "reward/accuracy"]
    assert component_names(keys) == ["format", "accuracy"]
