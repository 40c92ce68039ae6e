"""Countdown and the tasks of reasoning-gym."""

import json

import pytest

from rlbench_rewards.contract import RewardError, RewardSample
from rlbench_rewards.countdown import Countdown
from rlbench_rewards.reasoning_task import ReasoningTask


def value(reward, stated: str, **columns) -> float:
    return reward(RewardSample(prompt="", completion=f"<answer>{stated}</answer>", columns=columns)).value


ROW = {"numbers": [3, 5, 2, 7], "target": 28}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("(5 + 2) * (7 - 3)", 1.0), ("(5+2)*(7-3) = 28", 1.0), ("(5+2)×(7−3)", 1.0), ("7*(3*2)-5-9", 0.0), ("28", 0.0),
        ("7*2*5/3", 0.0), ("(5+2)*(7-3)+0", 0.0), ("5+2*7-3", 0.0), ("3+5+2+7", 0.0), ("(5+2)(7-3)", 0.0), ("", 0.0),
        ("(5+2)*(7-3", 0.0), ("(5+2)*(7-3)*1", 0.0), ("35 - 7 * 2", 0.0), ("5**2+7-3", 0.0), ("5^2+7-3", 0.0),
        ("(5+2)/(7-3-5+2-2)", 0.0), ("__import__('os')", 0.0), ("(5+2)*(7-3) = 29", 0.0), ("28 = (5+2)*(7-3)", 0.0),
    ],
)  # fmt: skip
def test_an_expression_uses_each_number_once_and_makes_the_target(answer, expected):
    assert value(Countdown(), answer, **ROW) == expected


def test_divisions_are_exact_and_some_numbers_may_stay_unused():
    assert value(Countdown(), "8/(3-8/3)", numbers=[8, 3, 8, 3], target=24) == 1.0
    assert value(Countdown(use_all=False), "7*(5-2+1)", **ROW) == 0.0
    assert value(Countdown(use_all=False), "7*2*2", **ROW) == 0.0
    assert value(Countdown(use_all=False), "7*5", numbers=[3, 5, 2, 7], target=35) == 1.0


def test_numbers_come_from_columns_or_from_the_metadata():
    assert value(Countdown(), "1+2", metadata=json.dumps({"numbers": [1, 2], "target": 3})) == 1.0
    assert value(Countdown(numbers_column="nums"), "1+2", nums=[2, 1], target=3) == 1.0
    with pytest.raises(RewardError, match="no column 'numbers', and its metadata has none either"):
        value(Countdown(), "1+2", target=3)


@pytest.mark.parametrize(
    "task", ["chain_sum", "spell_backward", "lcm", "basic_arithmetic", "sudoku", "family_relationships"]
)
def test_gold_answers_of_tasks_score_one_and_others_zero(task):
    import reasoning_gym

    reward = ReasoningTask(task)
    for problem in reasoning_gym.create_dataset(task, size=5, seed=3):
        row = {"answer": str(problem["answer"]), "metadata": json.dumps(problem["metadata"], default=str)}
        assert value(reward, row["answer"], question=problem["question"], **row) == 1.0
        assert value(reward, "no such answer", question=problem["question"], **row) == 0.0
    for case in ReasoningTask(f"reasoning_gym/{task}").unit_cases():
        assert reward(RewardSample(prompt="", completion=case.completion, columns=case.columns)).value == case.expected


@pytest.mark.parametrize("task", ["countdown", "puzzle24", "simple_integration", "propositional_logic"])
def test_tasks_whose_rule_evaluates_the_answer_are_refused(task):
    with pytest.raises(ValueError, match="may run the answer as code"):
        ReasoningTask(task)


def test_an_unknown_task_is_a_clear_error():
    with pytest.raises(ValueError, match="task is 'chain_sums', expected one of reasoning-gym's: "):
        ReasoningTask("chain_sums")
