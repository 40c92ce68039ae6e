"""Algorithms on a task with a known optimum: from a mean reward below 0.4 to above 0.9, on one thread."""

import pytest

from tests.loops.test_algorithm_families import finish, short, start  # noqa: F401 (short is a fixture)

OPTIONS = {
    "grpo": [],
    "rloo": [],
    "reinforce_plus_plus": [],
    "ppo": ["algorithm.critic.lr=0.003"],
    "online_dpo": ["optim.lr=0.01"],
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("algorithm", OPTIONS)
def test_the_reward_rises_from_below_04_to_above_09(short, tmp_path, algorithm):  # noqa: F811
    options = [f"algorithm={algorithm}", "training.num_steps=40", *OPTIONS[algorithm]]
    history = finish(start(short, tmp_path / "run", *options))
    rewards = [line["reward/mean"] for line in history]

    assert rewards[0] < 0.4
    assert sum(rewards[-3:]) / 3 > 0.9, rewards
