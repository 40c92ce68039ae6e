"""Code rows from files, with the columns of their data sets: prompts hold what the task needs, and no hidden test."""

import pytest

from rlbench.config.compose import to_run_config
from rlbench.data.chat import question_text
from rlbench.data.sources import load_rows
from rlbench_rewards import RewardSample
from rlbench_rewards.code_tests import CodeTests
from tests.architecture.test_layout import compose
from tests.data.code_files import ROWS, program, write


@pytest.fixture(scope="module")
def reward():
    reward = CodeTests()
    yield reward
    reward.close()


def loaded(name: str, folder):
    path = write(folder / f"{name}.jsonl", ROWS[name])
    config = to_run_config(compose("+exp=grpo_code", f"data={name}", f"data.path={path}"))
    return config.data, list(load_rows(config.data, "train").dataset)


@pytest.mark.parametrize("name", ROWS)
def test_a_right_program_scores_one_and_that_of_another_row_zero(name, tmp_path, reward):
    _, rows = loaded(name, tmp_path)

    for number, row in enumerate(rows[:4]):
        right, wrong = (program(name, rows[n], n) for n in (number, number + 1))
        for text, value in ((right, 1.0), (wrong, 0.0)):
            output = reward(RewardSample(prompt="", completion=f"```python\n{text}\n```", columns=row))
            assert output.value == value, output.details


def test_the_prompt_shows_the_visible_tests_and_not_the_hidden_ones(tmp_path):
    config, rows = loaded("mbpp", tmp_path)

    shown = question_text(rows[3], config)

    assert shown == f"{rows[3]['text']}\n\n" + "\n".join(rows[3]["test_list"])
    assert rows[3]["challenge_test_list"][0] not in shown


def test_an_empty_column_adds_nothing_to_the_prompt(tmp_path):
    config, rows = loaded("livecodebench", tmp_path)

    assert config.shown_columns == ["starter_code"]
    assert question_text(rows[0], config) == rows[0]["question_content"]


def test_a_shown_column_that_is_not_there_is_named(tmp_path):
    config, rows = loaded("mbpp", tmp_path)
    del rows[0]["test_list"]

    with pytest.raises(ValueError, match="data.shown_columns names 'test_list', expected one of: .*text"):
        question_text(rows[0], config)
