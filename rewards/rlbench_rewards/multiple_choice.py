"""Whether a completion chooses the right letter."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlbench_rewards.contract import RewardError, RewardOutput, RewardSample, UnitCase, column
from rlbench_rewards.extraction import POLICIES, extract_answer, state_answer, without_reasoning


class MultipleChoice:
    """1.0 if the completion's choice is the gold letter, 0.0 if it is another, none or several.

    Args:
        choices: the letters, in order.
        extract: policies in order, see `rlbench_rewards.extraction`.
        gold_column: column with the gold letter, "(C)" and "C." included, or with its index.
        index_base: of an index in the gold column: 0 or 1.

    Raises:
        ValueError: an unknown policy, or choices that are no different letters.
    """

    needs_right_answer = True

    def __init__(
        self,
        choices: str = "ABCD",
        extract: Sequence[str] = ("boxed", "answer_tag", "final_answer"),
        gold_column: str = "answer",
        index_base: int = 0,
    ) -> None:
        unknown = [policy for policy in extract if policy not in POLICIES]
        if unknown or not extract:
            raise ValueError(f"extract is {list(extract)}, expected some of: {', '.join(POLICIES)}")
        if len(choices) < 2 or not choices.isalpha() or len(set(choices.upper())) != len(choices):
            raise ValueError(f"choices is {choices!r}, expected at least two different letters")
        self._choices = choices.upper()
        self._extract = tuple(extract)
        self._gold_column, self._base = gold_column, index_base
        self._letter = re.compile(rf"(?<![A-Za-z])\(?([{self._choices}])\)?(?![A-Za-z'])")
        self.required_columns = (gold_column,)

    def __call__(self, sample: RewardSample) -> RewardOutput:
        gold = self._gold(sample)
        text = without_reasoning(sample.completion)
        answer = extract_answer(text, self._extract).answer if text is not None else None
        if answer is None:
            return RewardOutput(value=0.0, details={"reason": "no choice is stated"})
        if len(answer.strip()) == 1:
            answer = answer.upper()
        found = set(self._letter.findall(answer))
        if len(found) != 1:
            return RewardOutput(value=0.0, details={"reason": f"{len(found)} choices in {answer[:100]!r}"})
        chosen = found.pop()
        if chosen == gold:
            return RewardOutput(value=1.0, details={"answer": chosen})
        return RewardOutput(value=0.0, details={"answer": chosen})

    def gold_completion(self, sample: RewardSample) -> str:
        return state_answer(self._gold(sample), self._extract[0])

    def _gold(self, sample: RewardSample) -> str:
        gold = str(column(sample, self._gold_column)).strip().strip("().: ").upper()
        if gold.isdigit() and 0 <= int(gold) - self._base < len(self._choices):
            return self._choices[int(gold) - self._base]
        if len(gold) == 1 and gold in self._choices:
            return gold
        raise RewardError(f"column {self._gold_column!r} is {gold!r}, expected one of {self._choices} or an index")

    def unit_cases(self) -> list[UnitCase]:
        right, wrong = self._choices[0], self._choices[1]
        row = {self._gold_column: right}
        policy = self._extract[0]
        return [
            UnitCase(completion=state_answer(right, policy), expected=1.0, columns=row),
            UnitCase(completion=state_answer(wrong, policy), expected=0.0, columns=row),
            UnitCase(completion=state_answer(f"{right} or {wrong}", policy), expected=0.0, columns=row),
        ]
