"""Whether a completion's answer is the gold text, exactly or nearly."""

from __future__ import annotations

import difflib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlbench_rewards.contract import RewardError, RewardOutput, RewardSample, UnitCase, column
from rlbench_rewards.extraction import POLICIES, extract_answer, state_answer, without_reasoning

_MAX_CHARS = 4000
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
WAYS = ("exact", "contains", "token_f1", "edit")


class TextMatch:
    """How near the answer is to the gold text (the best of several gold texts).

    Args:
        way: "exact" (1.0 or 0.0), "contains" (1.0 if the answer holds the gold text as whole words), "token_f1" (F1 of
            their words) or "edit" (2 * matching characters / all characters).
        extract: policies in order, see `rlbench_rewards.extraction`; empty: the whole completion is the answer.
        gold_column: column with the gold text, or a list of texts.
        normalise: compare without case, punctuation, articles and extra blanks.
        min_value: a value below it scores 0.0.

    Raises:
        ValueError: an unknown way or policy.

    Source: normalisation and F1 as in the evaluation of SQuAD, arXiv:1606.05250.
    """

    needs_right_answer = True

    def __init__(
        self,
        way: str = "exact",
        extract: Sequence[str] = (),
        gold_column: str = "answer",
        normalise: bool = True,
        min_value: float = 0.0,
    ) -> None:
        unknown = [policy for policy in extract if policy not in POLICIES]
        if unknown:
            raise ValueError(f"extract is {list(extract)}, expected some of: {', '.join(POLICIES)}")
        if way not in WAYS:
            raise ValueError(f"way is {way!r}, expected one of: {', '.join(WAYS)}")
        self._way, self._extract, self._gold_column = way, tuple(extract), gold_column
        self._normalise, self._min_value = normalise, min_value
        self.required_columns = (gold_column,)

    def __call__(self, sample: RewardSample) -> RewardOutput:
        golds = self._golds(sample)
        text = without_reasoning(sample.completion)
        if text is not None and self._extract:
            text = extract_answer(text, self._extract).answer
        if text is None or not text.strip():
            return RewardOutput(value=0.0, details={"reason": "no answer"})
        if len(text) > _MAX_CHARS:
            return RewardOutput(value=0.0, details={"reason": f"an answer longer than {_MAX_CHARS} characters"})
        value = max(self._nearness(self._as_compared(text), self._as_compared(gold)) for gold in golds)
        return RewardOutput(value=value if value >= self._min_value else 0.0, details={"nearness": value})

    def gold_completion(self, sample: RewardSample) -> str:
        gold = self._golds(sample)[0]
        return state_answer(gold, self._extract[0]) if self._extract else gold

    def _golds(self, sample: RewardSample) -> list[str]:
        value: Any = column(sample, self._gold_column)
        golds = [str(gold) for gold in (value if isinstance(value, (list, tuple)) else [value])]
        golds = [gold for gold in golds if self._as_compared(gold)]
        if not golds:
            raise RewardError(f"column {self._gold_column!r} holds no text")
        return golds

    def _as_compared(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        if not self._normalise:
            return text.strip()
        plain = "".join(char for char in text.casefold() if char not in string.punctuation)
        return " ".join(_ARTICLES.sub(" ", plain).split())

    def _nearness(self, answer: str, gold: str) -> float:
        if self._way == "exact":
            return 1.0 if answer == gold else 0.0
        if self._way == "contains":
            return 1.0 if re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", answer) else 0.0
        if self._way == "token_f1":
            common = sum((Counter(answer.split()) & Counter(gold.split())).values())
            return 2 * common / (len(answer.split()) + len(gold.split())) if common else 0.0
        return difflib.SequenceMatcher(None, answer, gold, autojunk=False).ratio()

    def unit_cases(self) -> list[UnitCase]:
        row = {self._gold_column: "green apple"}
        right = state_answer("green apple", self._extract[0]) if self._extract else "green apple"
        return [
            UnitCase(completion=right, expected=1.0, columns=row),
            UnitCase(completion="", expected=0.0, columns=row),
        ]
