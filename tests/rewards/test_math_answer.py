"""What is equal, what is not, and what is refused before anything symbolic is tried."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbench_rewards.contract import RewardError, RewardSample
from rlbench_rewards.math_answer import MathAnswer, answers_equal

reward = MathAnswer()


def value(completion: str, gold: str, **options) -> float:
    grade = MathAnswer(**options) if options else reward
    return grade(RewardSample(prompt="", completion=completion, columns={"answer": gold})).value


RIGHT = [
    ("3 * 4 = 12\n#### 12", "12"),
    ("#### 12.0", "12"),
    ("#### $1,200", "1200"),
    ("#### 1200$", "1,200"),
    ("#### 10%", "10"),
    ("#### \u22125", "-5"),
    ("#### \uff14\uff12", "42"),
    ("#### 42.", "42"),
    ("#### 5/4", "1.25"),
    ("#### 1 1/4", "1.25"),
    ("#### 7", "He has 3 + 4 = <<3+4=7>>7 left.\n#### 7"),
    ("first #### 5\n#### 6\n#### 7", "7"),
    ("so \\boxed{42}", "42"),
    ("\\boxed{42} and again \\boxed{ 42 }", "42"),
    ("\\boxed{\\frac{1}{2}}", "0.5"),
    ("\\boxed{x^2+2x+1}", "(x+1)^2"),
    ("\\boxed{\\{1,2,3\\}}", "\\{3,2,1\\}"),
    ("<answer> 42 </answer>", "42"),
]

WRONG = [
    ("#### 13", "12"),
    ("the answer is 12", "12"),  # no policy finds it
    ("", "12"),
    ("#### 1", "1 1/4"),
    ("#### 2", "2 2/3"),
    ("#### 42; import os", "42"),
    ("#### 42 apples and 43 pears", "42"),
    ("\\boxed{1}\\boxed{2}\\boxed{42}", "42"),
    ("\\boxed{1-\\frac{1}{e}}", "1+\\frac{1}{e}"),
    ("\\boxed{\\frac{1}{2^{99}}}", "\\frac{1}{2^{98}}"),
    ("\\boxed{10^{-20}}", "2 \\cdot 10^{-20}"),
    ("\\boxed{(3, \\frac{2\\pi}{3})}", "(3, \\frac{\\pi}{2})"),
    ("\\boxed{\\frac{0}{0}}", "0"),
    ("#### 1,2,3", "123"),
]

BOMBS = [
    "9**9**9",
    "9^{9^{9}}",
    "(10^{9})!",
    "1000000!",
    "\\binom{1000000000}{500000000}",
    "\\sum_{i=1}^{1000000000} i",
    "(" * 3000 + "1" + ")" * 3000,
    "{" * 3000,
    "1" * 100_000,
    "x^{99999999}",
    "2^" * 30 + "2",
]


@pytest.mark.parametrize(("completion", "gold"), RIGHT)
def test_equal_answers_score_one(completion, gold):
    assert value(completion, gold) == 1.0


@pytest.mark.parametrize(("completion", "gold"), WRONG)
def test_different_answers_score_zero(completion, gold):
    assert value(completion, gold) == 0.0


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda b: b[:20])
@pytest.mark.parametrize("form", ["#### {}", "\\boxed{{{}}}"])
def test_bombs_are_wrong_at_once(bomb, form):
    start = time.monotonic()

    assert value(form.format(bomb), "42") == 0.0
    assert time.monotonic() - start < 3


def test_model_text_is_never_run_as_code(tmp_path):
    canary = tmp_path / "canary"
    for attack in (
        f"open('{canary}','w')",
        f'0*\\pi+len(str(open("{canary}","w")))',
        f"__import__('os').mknod('{canary}')",
    ):
        for form in ("#### {}", "\\boxed{{{}}}", "<answer>{}</answer>"):
            assert value(form.format(attack), "0") == 0.0

    assert not canary.exists()


def test_a_missing_or_empty_gold_answer_is_an_error_not_a_zero():
    with pytest.raises(RewardError, match="no column 'answer', it has question"):
        reward(RewardSample(prompt="", completion="#### 1", columns={"question": "?"}))
    with pytest.raises(RewardError, match="holds no answer"):
        reward(RewardSample(prompt="", completion="#### 1", columns={"answer": "steps ####  "}))


def test_the_extraction_policy_is_explicit():
    assert value("it is 12", "12", extract=["last_number"]) == 1.0
    assert value("\\boxed{12}", "12", extract=["hash"]) == 0.0
    with pytest.raises(ValueError, match=r"extract is \['lats_number'\]"):
        MathAnswer(extract=["lats_number"])


@settings(max_examples=60, deadline=None)
@given(st.integers(-(10**12), 10**12))
def test_an_integer_equals_itself_in_every_dress_and_no_other(number):
    for dress in (str(number), f"{number:,}", f"{number}.0", f"{number}.", f"${number}"):
        assert answers_equal(dress, str(number))[0]
    assert not answers_equal(str(number + 1), str(number))[0]
    assert not answers_equal(f"{number}.5", str(number))[0]


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=60), st.integers(-1000, 1000))
def test_any_text_gets_a_verdict(text, gold):
    assert value(f"#### {text}", str(gold)) in (0.0, 1.0)
