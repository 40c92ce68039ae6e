"""A run's metrics as the health rules read them: quarters, finite values, settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from rlbench.tracking.run_summary import QuarterChange, quarter_change

PROBLEM, WARNING, NOTE = "problem", "warning", "note"
SEVERITIES = (PROBLEM, WARNING, NOTE)
_FEWEST = 3  # steps that a finding of a short run rests on


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong with a run, or that its reader must know.

    Example:
        Finding(rule="truncation", severity="warning", title="Many completions are cut", evidence="43% ...",
                meaning="...", settings={"sampling.max_tokens": "128 (now 64)"})
    """

    rule: str  # its name in `rlbench.checks.health.RULES`
    severity: str  # one of SEVERITIES
    title: str
    evidence: str  # in numbers
    meaning: str
    settings: Mapping[str, str] = field(default_factory=dict)  # config key -> what to try


@dataclass(frozen=True, slots=True)
class History:
    """Rows of metrics.jsonl by phase, and the run's config.

    Args:
        train: the metrics of each step, in order.
        evaluations: of each evaluation, in order.
        config: nested as in config.yaml; may be empty.
    """

    train: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def column(self, key: str) -> list[float | None]:
        """One value a step; None where there is no finite number."""
        return [_number(row.get(key)) for row in self.train]

    def values(self, key: str) -> list[float]:
        """The finite values of a key."""
        return [value for value in self.column(key) if value is not None]

    def mean(self, key: str) -> float | None:
        return _mean(self.values(key))

    def median(self, key: str) -> float | None:
        values = self.values(key)
        return median(values) if values else None

    def early(self, key: str) -> float | None:
        """Mean over the first quarter of steps, of a short run over at most three."""
        return _mean([v for v in self.column(key)[: self._size] if v is not None])

    def late(self, key: str) -> float | None:
        """Mean over the last quarter of steps, of a short run over at most three."""
        return _mean([v for v in self.column(key)[-self._size :] if v is not None])

    def change(self, key: str) -> QuarterChange | None:
        """First against last quarter of steps; None where there are too few values."""
        return quarter_change(self.column(key))

    def evaluated(self, key: str) -> list[float]:
        """The finite values of a key over evaluations."""
        return [value for row in self.evaluations if (value := _number(row.get(key))) is not None]

    def setting(self, key: str) -> Any:
        """A setting by its dotted key; None if the config does not say."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def number(self, key: str) -> float | None:
        """A setting that is a number, else None."""
        return _number(self.setting(key))

    @property
    def non_finite(self) -> list[Mapping[str, Any]]:
        """Steps whose loss or gradient was no finite number."""
        return [row for row in self.train if any(is_of_update(key) for key in row.get("non_finite") or ())]

    @property
    def num_late(self) -> int:
        """Steps that `late` is the mean of."""
        return min(self._size, len(self.train))

    @property
    def _size(self) -> int:
        """A quarter; of few steps `_FEWEST`, but no more than half of them."""
        return max(1, min(_FEWEST, len(self.train) // 2), len(self.train) // 4)


def is_of_update(key: str) -> bool:
    """Whether a metric that is not finite means that the step's update was skipped."""
    return key.startswith(("loss/", "optim/"))


def percent(share: float) -> str:
    """A share with the digits that a reader needs: "0.4%", "12%"."""
    return f"{100 * share:.1f}%" if 0 < abs(share) < 0.0995 else f"{100 * share:.0f}%"


def now(value: object) -> str:
    """What a setting is at present, for an advice: " (now 64)"; empty if it is not known."""
    return "" if value is None else f" (now {value:g})" if isinstance(value, float) else f" (now {value})"


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
