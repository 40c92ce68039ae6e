"""Every reward has a file in conf/rewards, and what the file says is taken by the reward."""

import math
import re
from typing import Any

import pytest

from rlbench.config.compose import group_choices, to_run_config
from rlbench.config.trained_reward import is_trained
from rlbench.rollouts.score import reward_specs
from rlbench_rewards import RewardSample
from rlbench_rewards.contract import checked_value
from rlbench_rewards.loading import load_reward
from rlbench_rewards.trial import ADVERSARIAL
from tests.architecture.test_layout import ROOT, compose

ADDED = group_choices("rewards/add")
GIVEN = {  # what only a user can say
    "judge": ["base_url=http://127.0.0.1:9/v1", "model=m"],
    "pattern": ["pattern='a+'"],
    "remote": ["url=http://127.0.0.1:9"],
    "steps": ["kwargs.url=http://127.0.0.1:9"],
}
ROWS = {"reasoning_task": ["data=chain_sum"], "countdown": ["data=countdown"], "code": ["data=mbpp"]}


def given(name: str) -> list[str]:
    return [f"rewards.components.{name}.kwargs.{setting}" for setting in GIVEN.get(name, [])]


def composed(*overrides: str):
    return to_run_config(compose(*overrides)).rewards


def built(rewards) -> list[object]:
    needs_weights = [name for name, component in rewards.components.items() if is_trained(component)]
    specs = [spec for spec in reward_specs(rewards) if spec["name"] not in needs_weights]
    return [load_reward(spec["name"], spec["path"], spec["kwargs"]).target for spec in specs]


@pytest.mark.parametrize("name", [name for name in group_choices("rewards") if name != "code"])
def test_the_rewards_of_a_choice_can_be_built(name):
    rewards = composed(f"rewards={name}", *ROWS.get(name, []))

    assert built(rewards) or name in ("none", "reward_model")


@pytest.mark.parametrize("name", ADDED)
def test_a_reward_is_added_to_others_by_one_setting(name):
    rewards = composed("+exp=grpo_gsm8k", f"+rewards/add={name}", *given(name))

    assert list(rewards.components) == ["accuracy", "format", name]
    assert len(built(rewards)) == 3 and rewards.components[name].weight > 0


@pytest.mark.parametrize("name", [name for name in ADDED if name not in ("judge", "remote", "steps")])
def test_an_added_reward_has_a_value_for_every_adversarial_text(name):
    rewards = composed("+exp=grpo_gsm8k", f"+rewards/add={name}", *given(name))
    reward: Any = built(rewards)[-1]

    for text in ADVERSARIAL.values():
        output = reward(RewardSample(prompt="q", completion=text, num_tokens=len(text), columns={"answer": "5"}))
        assert math.isfinite(checked_value(output).value or 0.0)


def test_several_are_added_and_changed():
    choice = "+rewards/add=[overlong,repetition]"
    rewards = composed("+exp=dapo_gsm8k", choice, "sampling.max_tokens=99", "rewards.components.repetition.weight=3")

    assert list(rewards.components)[2:] == ["overlong", "repetition"]
    assert rewards.components["overlong"].kwargs == {"max_length": 99, "buffer": 16}
    assert rewards.components["repetition"].weight == 3.0


@pytest.mark.parametrize("name", GIVEN)
def test_what_only_a_user_can_say_is_asked_for(name):
    key = re.escape(given(name)[0].split("=")[0])
    with pytest.raises(ValueError, match=f"^{key} has no value, expected one: {key}="):
        composed("+exp=grpo_gsm8k", f"+rewards/add={name}")


def test_every_reward_of_the_table_has_a_file():
    table = re.findall(r"^\| `(\w+\.\w+)` \|", (ROOT / "rewards" / "README.md").read_text(), re.MULTILINE)
    files = [f"+rewards/add={name}" for name in ADDED] + [f"rewards={name}" for name in group_choices("rewards")]
    overrides = [[file, *given(file.split("=")[1])] for file in files]
    paths = {component.path for o in overrides for component in composed(*o).components.values()}

    assert len(table) >= 17
    assert {f"rlbench_rewards.{path}" for path in table} <= paths


def test_the_rule_of_a_task_follows_the_rows():
    rewards = composed("+exp=grpo_reasoning_gym", "data.name=reasoning_gym/spell_backward", "data.task_params={}")

    assert rewards.components["accuracy"].kwargs["task"] == "reasoning_gym/spell_backward"
    assert len(built(rewards)) == 2
