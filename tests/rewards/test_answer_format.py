"""The agreed form is exact."""

import pytest

from rlbench_rewards.answer_format import AnswerFormat
from rlbench_rewards.contract import RewardSample


def value(completion: str, **options) -> float:
    return AnswerFormat(**options)(RewardSample(prompt="", completion=completion)).value


@pytest.mark.parametrize(
    "text", ["#### 42", "1 + 1 = 2\n#### 2\n\n", "a\n ####  -1,200.50", "#### $5", "####7", "#### 10%"]
)
def test_a_last_line_in_the_form_scores_one(text):
    assert value(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        "#### 42\nmore",
        "#### x",
        "#### 1\n#### 2",
        "a #### 2",
        "#### ",
        "#### 4 apples",
        "#### 1 2",
        "##### 3 4",
    ],
)
def test_anything_else_scores_zero(text):
    assert value(text) == 0.0


def test_other_forms_and_patterns():
    assert value("so \\boxed{42}", form="boxed") == 1.0
    assert value("\\boxed{1} or \\boxed{2}", form="boxed") == 0.0
    assert value("<answer>42</answer>", form="answer_tag") == 1.0
    assert value("Answer: 4", pattern=r"Answer: \d+") == 1.0
    with pytest.raises(ValueError, match="form is 'hahs', expected one of: hash, boxed, answer_tag"):
        AnswerFormat(form="hahs")
    with pytest.raises(ValueError, match="no regular expression"):
        AnswerFormat(pattern="(")


@pytest.mark.parametrize("form", ["hash", "boxed", "answer_tag"])
def test_it_agrees_with_its_own_unit_cases(form):
    reward = AnswerFormat(form)
    cases = reward.unit_cases()

    assert [reward(RewardSample(prompt="", completion=c.completion)).value for c in cases] == [
        c.expected for c in cases
    ]
    assert sum(case.expected for case in cases) == 1.0
