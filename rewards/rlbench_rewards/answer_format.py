"""Whether a completion states its answer in the agreed form."""

from __future__ import annotations

import re

from rlbench_rewards.contract import RewardOutput, RewardSample, UnitCase
from rlbench_rewards.extraction import state_answer

_NUMBER = r"[-\u2212]?\$?[-\u2212]?\d[\d,]*(?:\.\d+)?"
_FORMS = {
    "hash": (rf"####[ \t]*{_NUMBER}%?", "####"),
    "boxed": (r".*\\boxed\{[^{}]{1,200}\}[ \t$.]*", r"\boxed"),
    "answer_tag": (r".*<answer>[^<>]{1,200}</answer>", "<answer>"),
}


class AnswerFormat:
    """1.0 if the last line that is not empty gives the answer in the form, and the form's mark occurs once; else 0.0.

    Args:
        form: "hash" (`#### 42`), "boxed" (`\\boxed{42}`) or "answer_tag" (`<answer>42</answer>`).
        pattern: a regular expression instead of a form; the whole last line must match it.

    Raises:
        ValueError: unknown form, or a pattern that does not compile.
    """

    def __init__(self, form: str = "hash", pattern: str | None = None) -> None:
        if pattern is None and form not in _FORMS:
            raise ValueError(f"form is {form!r}, expected one of: {', '.join(_FORMS)}")
        expression, self._mark = (pattern, None) if pattern is not None else _FORMS[form]
        try:
            self._pattern = re.compile(expression)
        except re.error as error:
            raise ValueError(f"pattern is {pattern!r}, which is no regular expression ({error})") from error
        self._stated = None if pattern is not None else state_answer("42", form)

    def __call__(self, sample: RewardSample) -> RewardOutput:
        lines = [line.strip() for line in sample.completion.split("\n") if line.strip()]
        if not lines:
            return RewardOutput(value=0.0, details={"reason": "empty completion"})
        if self._mark is not None and sample.completion.count(self._mark) != 1:
            count = sample.completion.count(self._mark)
            return RewardOutput(value=0.0, details={"reason": f"{self._mark} occurs {count} times, expected once"})
        if not self._pattern.fullmatch(lines[-1]):
            return RewardOutput(value=0.0, details={"reason": "the last line is not in the form"})
        return RewardOutput(value=1.0)

    def unit_cases(self) -> list[UnitCase]:
        cases = [UnitCase(completion="", expected=0.0)]
        if self._stated is not None:
            cases += [
                UnitCase(completion=f"so\n{self._stated}", expected=1.0),
                UnitCase(completion=f"{self._stated}\n{self._stated}", expected=0.0),
                UnitCase(completion=f"{self._stated}\nI am sure.", expected=0.0),
            ]
        return cases
