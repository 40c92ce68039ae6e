"""Countdown: an expression of the given numbers, each used once, that makes the target."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlbench_rewards.answers.bounds import AnswerTooBig
from rlbench_rewards.answers.parsing import parse_answer
from rlbench_rewards.answers.tokens import NotMath
from rlbench_rewards.answers.tree import Value
from rlbench_rewards.contract import RewardError, RewardOutput, RewardSample, UnitCase
from rlbench_rewards.extraction import POLICIES, extract_answer, state_answer, without_reasoning

_ALLOWED = re.compile(r"[\d+\-*/() ]+")
_MAX_CHARS = 300


class Countdown:
    """1.0 if the answer is an expression of + - * / and brackets over exactly the row's numbers that makes the target.

    The expression is read by the grammar of answers, never evaluated as code; "... = 24" behind it is allowed.

    Args:
        extract: policies in order, see `rlbench_rewards.extraction`.
        numbers_column, target_column: of the row, or names within its column "metadata" (a JSON object).
        use_all: every number must be used; else each at most once.

    Raises:
        ValueError: an unknown policy.
    """

    needs_right_answer = True

    def __init__(
        self,
        extract: Sequence[str] = ("answer_tag", "boxed", "hash"),
        numbers_column: str = "numbers",
        target_column: str = "target",
        use_all: bool = True,
    ) -> None:
        unknown = [policy for policy in extract if policy not in POLICIES]
        if unknown or not extract:
            raise ValueError(f"extract is {list(extract)}, expected some of: {', '.join(POLICIES)}")
        self._extract, self._use_all = tuple(extract), use_all
        self._numbers_column, self._target_column = numbers_column, target_column

    def __call__(self, sample: RewardSample) -> RewardOutput:
        numbers = Counter(int(number) for number in self._of_row(sample, self._numbers_column))
        target = int(self._of_row(sample, self._target_column))
        text = without_reasoning(sample.completion)
        answer = extract_answer(text, self._extract).answer if text is not None else None
        problem = "no answer" if answer is None else self._problem(answer, numbers, target)
        if problem:
            return RewardOutput(value=0.0, details={"answer": (answer or "")[:_MAX_CHARS], "reason": problem})
        return RewardOutput(value=1.0, details={"answer": answer})

    def gold_completion(self, sample: RewardSample) -> str:
        return state_answer(str(sample.columns["answer"]), self._extract[0])

    def _problem(self, answer: str, numbers: Counter[int], target: int) -> str:
        expression = answer.replace("×", "*").replace("÷", "/").replace("\u2212", "-").strip().strip("$").strip()
        expression = re.sub(rf"\s*=\s*{target}\s*$", "", expression)
        if len(expression) > _MAX_CHARS or not _ALLOWED.fullmatch(expression) or "**" in expression:
            return "more than numbers, + - * / and brackets"
        used = Counter(int(digits) for digits in re.findall(r"\d+", expression))
        if used != numbers and (self._use_all or used - numbers):
            return f"uses {sorted(used.elements())}, expected {sorted(numbers.elements())}"
        if re.search(r"\d\s+[\d(]|\)\s*[\d(]|\d\s*\(", expression):
            return "an operator is missing"
        try:
            tree = parse_answer(expression)
        except (AnswerTooBig, NotMath) as error:
            return f"no expression: {error}"
        if not isinstance(tree, Value) or tree.expr != target:
            return f"makes {getattr(tree, 'expr', 'no number')}, expected {target}"
        return ""

    def _of_row(self, sample: RewardSample, name: str) -> Any:
        row = sample.columns
        metadata = row.get("metadata")
        if name not in row and metadata is not None:
            row = json.loads(metadata) if isinstance(metadata, str) else metadata
        if name not in row:
            raise RewardError(f"the row has no column {name!r}, and its metadata has none either")
        return row[name]

    def unit_cases(self) -> list[UnitCase]:
        row = {self._numbers_column: [3, 5, 2], self._target_column: 21, "answer": "(5+2)*3"}
        cases = {"(5+2)*3": 1.0, "(5 + 2) * 3 = 21": 1.0, "21": 0.0, "3*5+6": 0.0, "(5+2)*3+0": 0.0, "(3*5)+2*3": 0.0}
        return [
            UnitCase(completion=state_answer(t, self._extract[0]), expected=v, columns=row) for t, v in cases.items()
        ]
