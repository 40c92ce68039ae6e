"""An advantage that is not defined for rewards below 0 is refused with what takes them there, before the run starts."""

import pytest

from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.schema import RewardsConfig, RunConfig

GATE = {"format": {"path": "rlbench_rewards.tags.Tags", "gate_min": 1.0}}
LOWERING = {
    "a penalty on KL": ({"kl_in": "reward", "kl": "k1", "kl_coef": 0.1}, {}, "algorithm.kl_in is reward"),
    "a penalty on length": ({"overlong_buffer_tokens": 8}, {}, "algorithm.overlong_buffer_tokens is 8"),
    "distances from a mean": ({}, {"combine": "normalised_sum"}, "rewards.combine is normalised_sum"),
    "a gate": ({}, {"gated_value": -1.0, "components": GATE}, "rewards.gated_value is -1.0"),
}


@pytest.mark.parametrize(("algorithm", "rewards", "message"), LOWERING.values(), ids=LOWERING.keys())
def test_maxrl_refuses_what_takes_rewards_below_0(algorithm, rewards, message):
    with pytest.raises(ValueError, match=f"{message}, which takes rewards below 0, where algorithm.advantage=maxrl"):
        RunConfig(algorithm=AlgorithmConfig(advantage="maxrl", **algorithm), rewards=RewardsConfig(**rewards))
    RunConfig(algorithm=AlgorithmConfig(**algorithm), rewards=RewardsConfig(**rewards))


def test_maxrl_takes_gates_and_penalties_that_leave_rewards_at_0():
    RunConfig(
        algorithm=AlgorithmConfig(advantage="maxrl", kl_coef=0.1),
        rewards=RewardsConfig(components=GATE, combine="product"),
    )
