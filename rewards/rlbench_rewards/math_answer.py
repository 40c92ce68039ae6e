"""Whether a completion's answer equals the gold answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlbench_rewards.contract import RewardError, RewardOutput, RewardSample
from rlbench_rewards.extraction import POLICIES, extract_answer
from rlbench_rewards.numbers import MAX_DIGITS, parse_number

MAX_CHARS = 2000
MAX_NESTING = 50
MAX_EXPONENT = 10_000
MAX_FACTORIAL = 1000
_MAX_SHOWN = 200

_EXPONENT = re.compile(r"\^\s*\{?\s*\(?\s*[-+]?\s*(\d+)")
_FACTORIAL = re.compile(r"(\d+)\s*[)}\]]*\s*!")
_BINOMIAL = re.compile(r"\\[dt]?binom\s*\{?\s*(\d+)")
_BIG_OPERATORS = re.compile(r"\\(sum|prod|int|iint|oint|lim)(?![a-zA-Z])")


class MathAnswer:
    """1.0 if the answer found in the completion equals the gold answer, else 0.0.

    Plain numbers are compared exactly, as fractions. Other answers are parsed as LaTeX and compared by math-verify,
    after a screening that refuses what could blow up; model text is never evaluated as code. Deadlines are the
    worker's: math-verify's own timeouts use signals and are switched off.

    Args:
        extract: policies in order, see `rlbench_rewards.extraction`; the first that finds an answer decides.
        gold_column: column of the data row with the gold answer; text behind the last `####` counts if there is one.

    Raises:
        ValueError: an unknown policy.
    """

    def __init__(self, extract: Sequence[str] = ("hash", "boxed", "answer_tag"), gold_column: str = "answer") -> None:
        unknown = [policy for policy in extract if policy not in POLICIES]
        if unknown or not extract:
            raise ValueError(f"extract is {list(extract)}, expected some of: {', '.join(POLICIES)}")
        self._extract = tuple(extract)
        self._gold_column = gold_column

    def __call__(self, sample: RewardSample) -> RewardOutput:
        gold = self._gold(sample)
        extracted = extract_answer(sample.completion, self._extract)
        if extracted.answer is None:
            return RewardOutput(value=0.0, details={"reason": extracted.reason})
        is_equal, reason = answers_equal(extracted.answer, gold)
        shown = extracted.answer[:_MAX_SHOWN]
        details = {"answer": shown, "gold": gold[:_MAX_SHOWN], "found_by": extracted.reason, "reason": reason}
        if is_equal:
            return RewardOutput(value=1.0, details=details)
        return RewardOutput(value=0.0, details=details)

    def _gold(self, sample: RewardSample) -> str:
        if self._gold_column not in sample.columns:
            raise RewardError(f"the row has no column {self._gold_column!r}, it has {', '.join(sample.columns)}")
        gold = str(sample.columns[self._gold_column]).rsplit("####", 1)[-1].strip()
        if not gold:
            raise RewardError(f"column {self._gold_column!r} holds no answer")
        return gold


def answers_equal(answer: str, gold: str) -> tuple[bool, str]:
    """Whether two answers are the same, and how that was found out."""
    if _squeezed(answer) == _squeezed(gold):
        return True, "same text"
    number, gold_number = parse_number(answer), parse_number(gold)
    if number is not None and gold_number is not None:
        return number == gold_number, "compared as exact numbers"
    refusal = refuse(answer)
    if refusal:
        return False, f"refused: {refusal}"
    return _equal_by_math_verify(answer, gold), "compared by math-verify"


def refuse(text: str) -> str:
    """Why an answer is not handed to symbolic parsing; "" if it may be."""
    if len(text) > MAX_CHARS:
        return f"longer than {MAX_CHARS} characters"
    if _nesting(text) > MAX_NESTING:
        return f"nested deeper than {MAX_NESTING}"
    if sum(char.isdigit() for char in text) > MAX_DIGITS:
        return f"more than {MAX_DIGITS} digits"
    if text.replace("**", "^").count("^") > 20 or re.search(r"\^[^^]{0,20}\^[^^]{0,20}\^", text.replace("**", "^")):
        return "a tower of exponents"
    if any(int(number) > MAX_EXPONENT for number in _EXPONENT.findall(text.replace("**", "^"))):
        return f"an exponent above {MAX_EXPONENT}"
    if re.search(r"\^\s*\{?[^{}^]{0,40}\^", text.replace("**", "^")):
        return "a tower of exponents"
    if any(int(number) > MAX_FACTORIAL for number in _FACTORIAL.findall(text)) or "!!" in text:
        return f"a factorial above {MAX_FACTORIAL}"
    if re.search(r"[)}]\s*!", text):
        return "a factorial of an expression"
    if any(int(number) > MAX_FACTORIAL for number in _BINOMIAL.findall(text)):
        return f"a binomial above {MAX_FACTORIAL}"
    if _BIG_OPERATORS.search(text):
        return "a sum, product, integral or limit"
    if any(mark in text for mark in ("__", "'", '"', ";", "`", "=>", "lambda", "import")):
        return "looks like code"
    return ""


def _equal_by_math_verify(answer: str, gold: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig()]
    options = {"extraction_config": config, "parsing_timeout": None, "fallback_mode": "no_fallback"}
    parsed_answer, parsed_gold = parse(f"${answer.strip('$ ')}$", **options), parse(f"${gold.strip('$ ')}$", **options)
    if not parsed_answer or not parsed_gold:
        return False
    if _are_different_numbers(parsed_answer[0], parsed_gold[0]):
        return False
    return bool(verify(parsed_gold, parsed_answer, timeout_seconds=None, strict=True))


def _are_different_numbers(first: object, second: object) -> bool:
    """True for two numeric values that differ: math-verify takes tiny ones for equal (1/2^99 and 1/2^98)."""
    from sympy import Expr

    if not (isinstance(first, Expr) and isinstance(second, Expr)) or first.free_symbols or second.free_symbols:
        return False
    if not (first.is_finite and second.is_finite):
        return first != second
    difference, scale = (first - second).evalf(30), abs(second.evalf(30))
    if not difference.is_number or not scale.is_number:
        return False
    return bool(abs(difference) > 1e-15 * max(abs(first.evalf(30)), scale))


def _nesting(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _squeezed(text: str) -> str:
    return "".join(text.split())
