"""Rewards in the config: what is taken, and what is a clear error."""

import pytest

from rlbench.config.schema import RewardConfig, RewardsConfig

PATH = "rlbench_rewards.math_answer.MathAnswer"


def test_a_component_takes_all_its_keys():
    component = {"path": PATH, "weight": 2, "gate_min": 1.0, "batch_size": 4, "timeout_s": 60, "kwargs": {"a": 1}}
    config = RewardsConfig(components={"accuracy": component}, combine="product")

    assert config.components["accuracy"] == RewardConfig(
        path=PATH, weight=2.0, gate_min=1.0, batch_size=4, timeout_s=60, kwargs={"a": 1}
    )


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ({"path": PATH, "wieght": 1}, r"there is no key 'rewards.components.x.wieght'; nearest valid keys: weight"),
        ({"path": PATH, "weight": "1"}, r"rewards.components.x.weight is '1', expected a number"),
        ({"path": PATH, "gate_min": True}, r"rewards.components.x.gate_min is True, expected a number"),
        ({"path": PATH, "batch_size": 0}, r"rewards.components.x.batch_size is 0"),
        ({"path": PATH, "timeout_s": 0}, r"rewards.components.x.timeout_s is 0"),
        ({}, r"rewards.components.x.path is missing"),
        (PATH, r"rewards.components.x is '.*', expected a mapping with path, weight"),
    ],
)
def test_a_wrong_component_is_one_sentence(component, message):
    with pytest.raises(ValueError, match=message):
        RewardsConfig(components={"x": component})


def test_ways_to_combine_are_a_closed_set():
    with pytest.raises(ValueError, match="rewards.combine"):
        RewardsConfig(combine="average")
