"""What a reward receives and returns, and what becomes of a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

VALUE, ERROR, TIMEOUT = "value", "error", "timeout"


class RewardError(Exception):
    """A verifier could not do its work. The rollout then has no reward; it is never scored 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSample:
    """One completion to score.

    Example:
        RewardSample(prompt="What is 2 + 2?", completion="#### 4", prompt_id="train/1", columns={"answer": "4"})
    """

    prompt: str  # as the model saw it
    completion: str
    prompt_id: str = ""
    is_truncated: bool = False  # cut at the token limit
    columns: Mapping[str, Any] = field(default_factory=dict)  # the data row; "answer" is the configured answer column


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardOutput:
    """A verdict. A wrong answer is 0.0 by an explicit branch of the reward."""

    value: float
    details: Mapping[str, Any] = field(default_factory=dict)  # JSON values, e.g. the extracted answer


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardOutcome:
    """What became of one call: a value, or an error or a timeout without one."""

    status: str  # "value", "error" or "timeout"
    value: float | None = None
    message: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    latency_s: float = 0.0


Reward = Callable[[RewardSample], RewardOutput]


def checked_value(output: object) -> RewardOutput:
    """`output`, if it is a RewardOutput with a finite number.

    Raises:
        RewardError: anything else; a bool, None, text or NaN is a broken reward, not a 0.
    """
    if not isinstance(output, RewardOutput):
        raise RewardError(f"the reward returned {type(output).__name__}, expected RewardOutput")
    value = output.value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RewardError(f"the reward's value is {value!r}, expected a number")
    if not math.isfinite(value):
        raise RewardError(f"the reward's value is {value}, expected a finite number")
    return output
