"""What a reward receives and returns, and what becomes of a call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

VALUE, ERROR, TIMEOUT, SKIPPED = "value", "error", "timeout", "skipped"


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
    num_tokens: int | None = None  # of the completion
    columns: Mapping[str, Any] = field(default_factory=dict)  # the data row; "answer" is the configured answer column


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardOutput:
    """A verdict. A wrong answer is 0.0 by an explicit branch of the reward.

    `value` is None if the reward does not apply to the sample (a code reward on a math row): the component is then
    left out of the total, which is something else than a verifier that broke.
    """

    value: float | None
    details: Mapping[str, Any] = field(default_factory=dict)  # JSON values, e.g. the extracted answer


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCase:
    """A completion whose value is known: what a reward's `unit_cases()` gives to `rlbench reward test`."""

    completion: str
    expected: float
    columns: Mapping[str, Any] = field(default_factory=dict)
    is_truncated: bool = False
    num_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardOutcome:
    """What became of one call: a value, or an error or a timeout without one, or a reward that does not apply."""

    status: str  # "value", "error", "timeout" or "skipped"
    value: float | None = None
    message: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    latency_s: float = 0.0
    num_tries: int = 1


def column(sample: RewardSample, name: str) -> Any:
    """The row's column.

    Raises:
        RewardError: the row has none of that name; never a 0.
    """
    if name not in sample.columns:
        raise RewardError(f"the row has no column {name!r}, it has {', '.join(sample.columns) or 'none'}")
    return sample.columns[name]


def checked_value(output: object) -> RewardOutput:
    """`output`, if it is a RewardOutput with a finite number or None.

    Raises:
        RewardError: anything else; a bool, text or NaN is a broken reward, not a 0.
    """
    if not isinstance(output, RewardOutput):
        raise RewardError(f"the reward returned {type(output).__name__}, expected RewardOutput")
    value = output.value
    if value is None:
        return output
    if isinstance(value, bool) or not isinstance(value, Real):  # numpy's numbers are Real, its truth values are not
        raise RewardError(f"the reward's value is {value!r}, expected a number")
    if not math.isfinite(value):
        raise RewardError(f"the reward's value is {value}, expected a finite number")
    return output if type(value) in (int, float) else replace(output, value=float(value))
