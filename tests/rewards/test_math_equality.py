"""Which answers are the same: a table, Math-Verify on the same table, and laws that hold for all answers."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbench_rewards.answers.bounds import AnswerTooBig
from rlbench_rewards.answers.comparing import Rules
from rlbench_rewards.answers.parsing import parse_answer
from rlbench_rewards.answers.tokens import NotMath
from rlbench_rewards.math_answer import MathAnswer, answers_equal
from tests.rewards.math_cases import BOMBS, DIFFERENT, EQUAL

MathAnswer()  # loads the libraries, so that the first timed answer does not


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_the_same_answer_in_other_words_is_equal(gold, answer):
    assert answers_equal(answer, gold)[0]


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_another_answer_is_not_equal(gold, answer):
    assert not answers_equal(answer, gold)[0]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda b: ascii(b[:20]))
@pytest.mark.parametrize("gold", ["42", "x^2+1", r"\{1, 2\}", r"\sum_{i=1}^{n} i"])
def test_a_bomb_is_wrong_within_a_fifth_of_a_second(bomb, gold):
    start = time.monotonic()

    assert not answers_equal(bomb, gold)[0]
    assert time.monotonic() - start < 0.2 + 1.8  # slack for a busy machine


def math_verify_says(gold: str, answer: str) -> bool:
    from math_verify import parse, verify

    return bool(
        verify(parse(f"${gold}$", parsing_timeout=2), parse(f"${answer}$", parsing_timeout=2), timeout_seconds=2)
    )


def test_fewer_false_positives_and_fewer_misses_than_math_verify():
    theirs = {
        "false positives": sum(math_verify_says(gold, answer) for gold, answer in DIFFERENT),
        "misses": sum(not math_verify_says(gold, answer) for gold, answer in EQUAL),
    }
    ours = {
        "false positives": sum(answers_equal(answer, gold)[0] for gold, answer in DIFFERENT),
        "misses": sum(not answers_equal(answer, gold)[0] for gold, answer in EQUAL),
    }

    assert ours == {"false positives": 0, "misses": 0}
    print(f"Math-Verify on {len(DIFFERENT)} different and {len(EQUAL)} equal pairs: {theirs}")
    assert theirs["false positives"] >= 10 and theirs["misses"] >= 10


SAMPLES = [gold for gold, _ in EQUAL] + [answer for _, answer in EQUAL]


@pytest.mark.parametrize("answer", SAMPLES)
def test_every_answer_equals_itself_in_any_wrapping(answer):
    for wrapped in (answer, f"${answer}$", f"\\boxed{{{answer}}}", f"  {answer} .", f"\\({answer}\\)"):
        assert answers_equal(wrapped, answer)[0], wrapped


def test_equality_is_symmetric_for_values():
    asymmetric = ("x", "z", "=", "p", "y", "[")
    for gold, answer in EQUAL + DIFFERENT:
        if not any(mark in gold + answer for mark in asymmetric):
            assert answers_equal(answer, gold)[0] == answers_equal(gold, answer)[0], (gold, answer)


# Expressions made from a grammar, with their value as text in two spellings.
ATOMS = st.one_of(st.integers(0, 99).map(str), st.sampled_from(["x", "y", r"\pi", r"\sqrt{2}", "e"]))


def grown(inner):
    two = st.tuples(inner, inner)
    return st.one_of(
        two.map(lambda t: f"({t[0]}+{t[1]})"),
        two.map(lambda t: f"({t[0]}-{t[1]})"),
        two.map(lambda t: rf"({t[0]} \cdot {t[1]})"),
        two.map(lambda t: rf"\frac{{{t[0]}}}{{{t[1]}}}"),
        inner.map(lambda t: f"({t})^2"),
        inner.map(lambda t: rf"\sin({t})"),
    )


EXPRESSIONS = st.recursive(ATOMS, grown, max_leaves=6)


def is_readable(text: str) -> bool:
    try:
        parse_answer(text)
    except (NotMath, AnswerTooBig):
        return False
    return True


@settings(max_examples=80, deadline=None)
@given(EXPRESSIONS)
def test_spelling_changes_nothing(text):
    if not is_readable(text):  # a division by zero
        return
    spellings = (text.replace("\\frac", "\\dfrac"), text.replace("(", r"\left(").replace(")", r"\right)"),
                 text.replace(r"\cdot", "*"), text.replace(r"\cdot", r"\times"), text.replace("+", " + "),
                 text.replace(r"\pi", "π"))  # fmt: skip

    for spelling in spellings:
        assert answers_equal(spelling, text)[0], spelling
    assert answers_equal(f"0 + {text}", text)[0]


@settings(max_examples=80, deadline=None)
@given(EXPRESSIONS)
def test_one_more_is_another_answer(text):
    if is_readable(text):
        assert not answers_equal(f"{text} + 1", text)[0]
        if not answers_equal("0", text)[0]:  # relative: beside 10^10, 10^-15 is below what values are compared to
            assert not answers_equal(f"({text}) * (1 + 10^{{-15}})", text)[0]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10**15), st.data())
def test_one_changed_digit_is_wrong(number, data):
    digits = str(number)
    place = data.draw(st.integers(0, len(digits) - 1))
    other = data.draw(st.sampled_from([d for d in "0123456789" if d != digits[place]]))
    changed = digits[:place] + other + digits[place + 1 :]

    assert not answers_equal(changed, digits)[0]
    assert not answers_equal(f"\\frac{{{changed}}}{{7}}", f"\\frac{{{digits}}}{{7}}")[0]


PIECES = (
    r"\frac \sqrt { } ( ) [ ] ^ _ 1 9 99999 x e i \pi + - * / ! % | , ; = < \le \in \cup \pm \infty . and "
    r"\text{m} \log \sin \binom \begin{pmatrix} \end{pmatrix} & \\ \{ \} : $ \boxed{ f( 0 \overline{"
).split() + [" "]


def test_three_thousand_random_strings_get_a_verdict_without_an_exception():
    rng = random.Random(5)
    slowest = 0.0
    for _ in range(3000):
        answer, gold = ("".join(rng.choices(PIECES, k=rng.randint(1, 14))) for _ in range(2))
        start = time.monotonic()
        for pair in ((answer, gold), (answer, answer), (answer, "42"), (answer, "x+1")):
            assert answers_equal(*pair)[0] in (True, False)
        slowest = max(slowest, time.monotonic() - start)

    assert slowest < 3.0


def test_the_rules_are_options():
    assert not answers_equal("10%", "0.1")[0]
    assert answers_equal("10%", "0.1", Rules(percent="fraction"))[0]
    assert not answers_equal("10%", "10", Rules(percent="fraction"))[0]
    assert answers_equal("10%", "10", Rules(percent="both"))[0]
    assert answers_equal("0.33", r"\frac{1}{3}", Rules(min_rounded_digits=2))[0]
    assert not answers_equal("0.34", r"\frac{1}{3}", Rules(min_rounded_digits=2))[0]
    assert not answers_equal("1 < x < 2", "(1,2)")[0]
    assert answers_equal("1 < x < 2", "(1,2)", Rules(relations_as_sets=True))[0]
