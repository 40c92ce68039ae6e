"""What tells two runs apart: settings, numbers over the steps that both have, completions of the same prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

from rlbench.report.comparison import KEYS, compared_settings
from rlbench.report.curves import column
from rlbench.report.rollout_files import RolloutFile
from rlbench.report.run_folder import RunRecord
from rlbench.tracking.metrics import component_names
from rlbench.tracking.rollout_store import read_rollouts

NOT_SET = "not set"
MIN_WINDOW = 2  # steps
MIN_SPREAD = 4  # values in each run, the fewest whose spread is worth a verdict


@dataclass(frozen=True, slots=True)
class SettingDifference:
    """A setting with two values; the reason where a run derived its own."""

    key: str
    a: str
    b: str
    reason_a: str = ""
    reason_b: str = ""


@dataclass(frozen=True, slots=True)
class NumberDifference:
    """A metric's mean in both runs over the same steps.

    Example:
        NumberDifference("reward/mean", 0.3, 0.5, 0.05)
    """

    key: str
    a: float
    b: float
    two_standard_errors: float | None  # of b - a, from the spread between steps; None: too few of them

    @property
    def difference(self) -> float:
        return self.b - self.a

    @property
    def is_clear(self) -> bool:
        return self.two_standard_errors is not None and abs(self.difference) > self.two_standard_errors


@dataclass(frozen=True, slots=True)
class SamePrompt:
    """A prompt that both runs answered at one step: a row of each one's rollout file."""

    step: int
    is_evaluation: bool
    a: Mapping[str, Any]
    b: Mapping[str, Any]


def setting_differences(a: RunRecord, b: RunRecord) -> list[SettingDifference]:
    """Settings whose values differ, in the order of the config."""
    of_a, of_b = compared_settings(a), compared_settings(b)
    keys = [key for key in dict.fromkeys([*of_a, *of_b]) if of_a.get(key) != of_b.get(key)]
    return [
        SettingDifference(key, of_a.get(key, NOT_SET), of_b.get(key, NOT_SET), _reason(a, key), _reason(b, key))
        for key in keys
    ]


def _reason(run: RunRecord, key: str) -> str:
    entry = run.derived.get(key)
    return str(entry.get("reason") or "") if isinstance(entry, Mapping) else ""


def common_window(a: RunRecord, b: RunRecord) -> list[int]:
    """The last quarter of the steps that both runs have, at least MIN_WINDOW of them where there are so many."""
    steps = sorted({row["step"] for row in a.train} & {row["step"] for row in b.train})
    return steps[-max(MIN_WINDOW, len(steps) // 4) :]


def number_differences(a: RunRecord, b: RunRecord, window: Sequence[int]) -> list[NumberDifference]:
    """Metrics that both runs recorded in the window.

    Args:
        window: steps, as of `common_window`.
    """
    found, steps = [], set(window)
    rows_a, rows_b = ([row for row in run.train if row["step"] in steps] for run in (a, b))
    for key in compared_keys(a, b):
        of_a, of_b = (_values(rows, key) for rows in (rows_a, rows_b))
        if of_a and of_b:
            found.append(NumberDifference(key, fmean(of_a), fmean(of_b), _two_standard_errors(of_a, of_b)))
    return found


def compared_keys(a: RunRecord, b: RunRecord) -> list[str]:
    """Metric keys of a comparison, the reward's components behind the reward."""
    keys = dict.fromkeys(key for run in (a, b) for row in run.train for key in row)
    names = component_names(keys)
    rest = [key for key in KEYS[1:] if not (key == "accuracy/train" and "accuracy" in names)]  # it is that component
    return [KEYS[0], *(f"reward/{name}" for name in names), *rest, "memory/peak_gib"]


def _values(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [value for value in column(rows, key) if value is not None]


def _two_standard_errors(a: Sequence[float], b: Sequence[float]) -> float | None:
    if min(len(a), len(b)) < MIN_SPREAD:
        return None
    return 2 * math.sqrt(variance(a) / len(a) + variance(b) / len(b))


def same_prompts(a: Sequence[RolloutFile], b: Sequence[RolloutFile], max_prompts: int) -> list[SamePrompt]:
    """Answers to the same prompts in the last evaluation that both runs made, else in the last such training step.

    Those whose rewards differ most come first.

    Args:
        a: rollout files of a run.
        b: of the other.
        max_prompts: most that are returned.
    """
    for is_evaluation in (True, False):
        of_a, of_b = ({f.step: f for f in files if f.is_evaluation == is_evaluation} for files in (a, b))
        for step in sorted(of_a.keys() & of_b.keys(), reverse=True):
            pairs = _pairs(of_a[step], of_b[step])
            if pairs:
                pairs.sort(key=lambda pair: -abs((pair[0]["reward"] or 0.0) - (pair[1]["reward"] or 0.0)))
                return [SamePrompt(step, is_evaluation, *pair) for pair in pairs[:max_prompts]]
    return []


def _pairs(a: RolloutFile, b: RolloutFile) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The first completion of each prompt that both files have, text and all."""
    of_a, of_b = (_first_of_prompts(file) for file in (a, b))
    return [(of_a[key], of_b[key]) for key in of_a if key in of_b]


def _first_of_prompts(file: RolloutFile) -> dict[tuple[str, str], dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(read_rollouts(file.path), key=lambda row: row["sample_index"]):
        found.setdefault((row["prompt_id"], row["prompt_text"]), row)
    return found
