"""Whether a completion is made of the agreed tags: `<think>...</think><answer>...</answer>`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlbench_rewards.contract import RewardOutput, RewardSample, UnitCase


class TagFormat:
    """1.0 if each tag opens and closes once, in order, with something in it and nothing but blanks around; else 0.0.

    Args:
        tags: names, in order.
        is_first_opened: the prompt already ends with the first opening tag.
        allow_text_around: text before, between and behind the tags is no fault.

    Raises:
        ValueError: no tags, or a name that is no tag's name.
    """

    def __init__(
        self,
        tags: Sequence[str] = ("think", "answer"),
        is_first_opened: bool = False,
        allow_text_around: bool = False,
    ) -> None:
        if not tags or any(not re.fullmatch(r"\w+", tag) for tag in tags) or len(set(tags)) != len(tags):
            raise ValueError(f"tags is {list(tags)}, expected different names of letters, digits and _")
        self._tags = tuple(tags)
        self._is_first_opened = is_first_opened
        self._allow_text_around = allow_text_around

    def __call__(self, sample: RewardSample) -> RewardOutput:
        problem = self._problem(f"<{self._tags[0]}>{sample.completion}" if self._is_first_opened else sample.completion)
        if problem:
            return RewardOutput(value=0.0, details={"reason": problem})
        return RewardOutput(value=1.0)

    def _problem(self, text: str) -> str:
        position = 0
        for tag in self._tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            if text.count(opening) != 1 or text.count(closing) != 1:
                counts = f"{text.count(opening)} times and {closing} {text.count(closing)} times"
                return f"{opening} occurs {counts}, expected once each"
            start, end = text.find(opening, position), text.find(closing, position)
            if start < 0 or end < start:
                return f"<{tag}> is not in its place"
            if not text[start + len(opening) : end].strip():
                return f"<{tag}> is empty"
            if text[position:start].strip() and not self._allow_text_around:
                return f"text in front of {opening}"
            position = end + len(closing)
        if text[position:].strip() and not self._allow_text_around:
            return f"text behind </{self._tags[-1]}>"
        return ""

    def unit_cases(self) -> list[UnitCase]:
        full = "\n".join(f"<{tag}>x</{tag}>" for tag in self._tags)
        right = full.removeprefix(f"<{self._tags[0]}>") if self._is_first_opened else full
        return [
            UnitCase(completion=right, expected=1.0),
            UnitCase(completion="", expected=0.0),
            UnitCase(completion=full + full, expected=0.0),
            UnitCase(completion=right.replace(f"</{self._tags[-1]}>", ""), expected=0.0),
        ]
