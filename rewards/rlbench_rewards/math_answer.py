"""Whether a completion's answer equals the gold answer."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from rlbench_rewards.answers.bounds import MAX_CHARS, MAX_NESTING, AnswerTooBig, check_text
from rlbench_rewards.answers.text import strip_delimiters, text_key
from rlbench_rewards.contract import RewardError, RewardOutput, RewardSample, UnitCase, column
from rlbench_rewards.extraction import POLICIES, Extracted, extract_answer, state_answer, without_reasoning
from rlbench_rewards.numbers import parse_number

BOXES = ("agree", "last", "all")
PERCENTS = ("same", "fraction", "both")
_MAX_SHOWN = 200
_BIG_NUMBER = re.compile(r"\d{5,}")


class MathAnswer:
    """1.0 if the answer found in the completion equals the gold answer, else 0.0.

    Plain numbers are compared exactly, as fractions. Other answers are read by a grammar of our own into sympy
    expressions and structures (`answers/`), bounded before anything is built; model text is never evaluated as code.
    What the grammar does not know on both sides (sums, integrals) goes to math-verify. Deadlines are the worker's.

    Args:
        extract: policies in order, see `rlbench_rewards.extraction`; the first that finds an answer decides.
        gold_column: column of the data row with the gold answer; text behind the last `####` counts if there is one,
            else what is in `\\boxed{}`.
        boxes: several boxes: "agree" (each equals the gold answer, or all together are its list), "last", or "all"
            (together they are a list).
        percent: "same" (10% equals 10), "fraction" (10% equals 0.1) or "both".
        min_rounded_digits: a decimal equals a value that is no decimal if it is that value correctly rounded and shows
            at least so many digits.
        relations_as_sets: whether 1 < x < 2 answers a gold (1, 2); (1, 2) always answers a gold 1 < x < 2.
        decimal_comma: whether 1,22 equals 1.22.
        strip_reasoning: whether only text behind `</think>` counts; `<think>` without an end then has no answer.

    Raises:
        ValueError: an unknown policy or option.
    """

    needs_right_answer = True

    def __init__(
        self,
        extract: Sequence[str] = ("hash", "boxed", "answer_tag"),
        gold_column: str = "answer",
        boxes: str = "agree",
        percent: str = "same",
        min_rounded_digits: int = 6,
        relations_as_sets: bool = False,
        decimal_comma: bool = False,
        strip_reasoning: bool = True,
    ) -> None:
        unknown = [policy for policy in extract if policy not in POLICIES]
        if unknown or not extract:
            raise ValueError(f"extract is {list(extract)}, expected some of: {', '.join(POLICIES)}")
        for name, value, known in (("boxes", boxes, BOXES), ("percent", percent, PERCENTS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of: {', '.join(known)}")
        from rlbench_rewards.answers.comparing import Rules

        _load_math_verify()  # takes a second; not within the first answer's deadline
        self._extract = tuple(extract)
        self._gold_column = gold_column
        self._boxes = boxes
        self._decimal_comma = decimal_comma
        self._strip_reasoning = strip_reasoning
        self.required_columns = (gold_column,)
        self._rules = Rules(percent, min_rounded_digits, relations_as_sets)

    def __call__(self, sample: RewardSample) -> RewardOutput:
        gold = self._gold(sample)
        text = without_reasoning(sample.completion) if self._strip_reasoning else sample.completion
        if text is None:
            return RewardOutput(value=0.0, details={"reason": "the reasoning never ends"})
        extracted = extract_answer(text, self._extract)
        if extracted.answer is None:
            return RewardOutput(value=0.0, details={"reason": extracted.reason})
        is_equal, reason = self._verdict(extracted, gold)
        shown = extracted.answer[:_MAX_SHOWN]
        details = {"answer": shown, "gold": gold[:_MAX_SHOWN], "found_by": extracted.reason, "reason": reason}
        if is_equal:
            return RewardOutput(value=1.0, details=details)
        return RewardOutput(value=0.0, details=details)

    def gold_completion(self, sample: RewardSample) -> str:
        """A completion that gives the gold answer in the form that the first policy looks for."""
        return state_answer(self._gold(sample), self._extract[0])

    def unit_cases(self) -> list[UnitCase]:
        row, policy = {self._gold_column: "1/2"}, self._extract[0]
        wrong = ("0.25", "-1/2", "1/2 or 1/3") if policy != "last_number" else ("0.25", "-1/2")
        return [
            UnitCase(completion=state_answer("0.5", policy), expected=1.0, columns=row),
            UnitCase(completion="", expected=0.0, columns=row),
            *(UnitCase(completion=state_answer(text, policy), expected=0.0, columns=row) for text in wrong),
        ]

    def _verdict(self, extracted: Extracted, gold: str) -> tuple[bool, str]:
        assert extracted.answer is not None
        boxes = list(dict.fromkeys(extracted.boxes))
        if len(boxes) < 2 or self._boxes == "last":
            return self._equal(extracted.answer, gold)
        together = self._equal(", ".join(boxes), gold) if len(boxes) <= 50 else (False, "too many boxes")
        if self._boxes == "all" or together[0]:
            return together
        if len(boxes) <= 8 and all(self._equal(box, gold)[0] for box in boxes):
            return True, "every box"
        return False, f"{len(boxes)} boxed answers that differ"

    def _equal(self, answer: str, gold: str) -> tuple[bool, str]:
        if self._decimal_comma:
            answer, gold = (re.sub(r"^\s*([-+]?\d+),(\d+)\s*$", _as_decimal, text) for text in (answer, gold))
        return answers_equal(answer, gold, self._rules)

    def _gold(self, sample: RewardSample) -> str:
        gold = str(column(sample, self._gold_column))
        if "####" in gold:
            gold = gold.rsplit("####", 1)[-1]
        elif "\\boxed" in gold:
            gold = extract_answer(gold, ("boxed",)).answer or ""
        gold = gold.strip()
        if not gold:
            raise RewardError(f"column {self._gold_column!r} holds no answer")
        return gold


def _as_decimal(match: re.Match[str]) -> str:
    is_thousands = len(match[2]) == 3 and len(match[1].lstrip("+-")) <= 3 and match[1].lstrip("+-0")
    return match[0] if is_thousands else f"{match[1]}.{match[2]}"


def answers_equal(answer: str, gold: str, rules: Any = None) -> tuple[bool, str]:
    """Whether two answers are the same, and how that was found out."""
    from rlbench_rewards.answers.comparing import Rules, equal_answers
    from rlbench_rewards.answers.tokens import NotMath

    rules = rules or Rules()
    if not answer.strip():
        return False, "an empty answer"
    number, gold_number = parse_number(answer), parse_number(gold)
    if number is not None and gold_number is not None and not ("%" in answer + gold and rules.percent != "same"):
        return number == gold_number, "compared as exact numbers"
    try:
        check_text(answer)
    except AnswerTooBig as error:
        return answer.strip() == gold.strip(), f"refused: {error}"
    if text_key(strip_delimiters(answer)) == text_key(strip_delimiters(gold)):
        return True, "same text"
    answer_tree, gold_tree = _tree(answer), _tree(gold)
    if isinstance(answer_tree, AnswerTooBig):
        return False, f"refused: {answer_tree}"
    if isinstance(answer_tree, NotMath) and isinstance(gold_tree, Exception):
        return _equal_by_math_verify(answer, gold)
    if isinstance(answer_tree, Exception) or isinstance(gold_tree, Exception):
        return False, f"not read as an answer: {answer_tree if isinstance(answer_tree, Exception) else gold_tree}"
    return equal_answers(answer_tree, gold_tree, rules), "compared as expressions"


@lru_cache(maxsize=512)
def _tree(text: str) -> Any:
    """The answer's tree, or the exception that says why there is none. Gold answers repeat within a group."""
    from rlbench_rewards.answers.parsing import parse_answer
    from rlbench_rewards.answers.tokens import NotMath

    try:
        return parse_answer(text)
    except (AnswerTooBig, NotMath) as error:
        return error
    except RecursionError:
        return AnswerTooBig("nested too deeply")


def _equal_by_math_verify(answer: str, gold: str) -> tuple[bool, str]:
    """For what our grammar does not know: structural equality of two parsed LaTeX expressions."""
    problem = _unfit_for_math_verify(answer)
    if problem:
        return False, f"refused: {problem}"
    parse, verify, LatexExtractionConfig = _load_math_verify()
    options = {"extraction_config": [LatexExtractionConfig()], "parsing_timeout": None, "fallback_mode": "no_fallback"}
    trees = [parse(f"${strip_delimiters(text)}$", **options) for text in (gold, answer)]
    if not all(trees):
        return False, "not read as an answer"
    return bool(verify(*trees, timeout_seconds=None, strict=True)), "compared by math-verify"


@lru_cache(maxsize=1)
def _load_math_verify() -> tuple[Any, Any, Any]:
    from math_verify import LatexExtractionConfig, parse, verify

    # It warns that its own timeouts are off; they use signals, ours is the worker's deadline.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return parse, verify, LatexExtractionConfig


def _unfit_for_math_verify(text: str) -> str:
    """Why a text that our grammar does not know is not handed on; "" if it may be."""
    if not re.search(r"\\(sum|prod|int|lim|gamma|Gamma|zeta|pmod|bmod|forall)(?![a-zA-Z])", text):
        return "neither an answer nor a LaTeX sum, product, integral or limit"
    if _BIG_NUMBER.search(text):
        return "a number above 9999 in a sum, product, integral or limit"
    if re.search(r"\^[^^]{0,40}\^", text) or "!" in text or text.count("^") > 20 or "binom" in text:
        return "a tower of exponents, a factorial or a binomial in a sum, product, integral or limit"
    if any(mark in text for mark in ("__", "'", '"', ";", "`", "lambda", "import", "open")):
        return "looks like code"
    return ""


__all__ = ["MAX_CHARS", "MAX_NESTING", "MathAnswer", "answers_equal"]
