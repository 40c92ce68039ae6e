"""Whether a completion matches a regular expression."""

from __future__ import annotations

import re

from rlbench_rewards.contract import RewardOutput, RewardSample


class PatternMatch:
    """1.0 if the completion matches, else 0.0. A pattern that never ends is stopped by the worker's deadline.

    Args:
        pattern: Python's syntax; `.` matches line breaks.
        where: "whole" (surrounding blanks aside), "start", or "anywhere".

    Raises:
        ValueError: a pattern that does not compile, or an unknown place.
    """

    def __init__(self, pattern: str, where: str = "whole") -> None:
        try:
            compiled = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern is {pattern!r}, which is no regular expression ({error})") from error
        places = {"whole": compiled.fullmatch, "start": compiled.match, "anywhere": compiled.search}
        if where not in places:
            raise ValueError(f"where is {where!r}, expected one of: {', '.join(places)}")
        self._match = places[where]

    def __call__(self, sample: RewardSample) -> RewardOutput:
        return RewardOutput(value=1.0 if self._match(sample.completion.strip()) else 0.0)
