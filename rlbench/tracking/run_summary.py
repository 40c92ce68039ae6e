"""What a run taught the model, in sentences that do not claim more than the numbers show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlbench.tracking.formats import format_duration, format_fraction
from rlbench.tracking.intervals import difference_interval, sign_test_p, wilson_interval
from rlbench.tracking.metrics import component_names

SIGNIFICANCE = 0.05
MIN_STEPS = 8  # two steps in each quarter, the least that has a spread


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyChange:
    """Two evaluations of one data set, before and after training.

    `num_gained` (wrong before, right after) and `num_lost` come from the same problems answered twice; with them the
    difference is tested by pairs, which finds smaller differences.

    Example:
        AccuracyChange(name="gsm8k test", correct_before=21, num_before=100, correct_after=34, num_after=100)
    """

    name: str
    correct_before: int
    num_before: int
    correct_after: int
    num_after: int
    num_gained: int | None = None
    num_lost: int | None = None


@dataclass(frozen=True, slots=True)
class QuarterChange:
    """A metric's mean over the first and the last quarter of steps."""

    first: float
    last: float
    two_standard_errors: float  # of the difference, from the spread between steps

    @property
    def difference(self) -> float:
        return self.last - self.first

    @property
    def verdict(self) -> str:
        """ "rose", "fell", or "no clear change" if the difference is within two standard errors."""
        if abs(self.difference) <= self.two_standard_errors:
            return "no clear change"
        return "rose" if self.difference > 0 else "fell"


def quarter_change(values: Sequence[float | None]) -> QuarterChange | None:
    """Compare the last quarter of a run's steps with the first.

    Args:
        values: one a step, in order; None and nan (no value in that step) are left out after the cut in quarters.

    Returns:
        None with fewer than MIN_STEPS steps, or fewer than 2 values in a quarter.
    """
    size = len(values) // 4
    if len(values) < MIN_STEPS:
        return None
    first, last = _finite(values[:size]), _finite(values[-size:])
    if min(len(first), len(last)) < 2:
        return None
    standard_error = math.sqrt(_variance(first) / len(first) + _variance(last) / len(last))
    return QuarterChange(_mean(first), _mean(last), 2 * standard_error)


def learning_lines(
    history: Sequence[Mapping[str, float | None]], metrics: Mapping[str, str] | None = None
) -> list[str]:
    """What training is about, first against last quarter of steps, one line each.

    Args:
        history: the metrics of each step, in order (`read_metrics(path, phase="train")`).
        metrics: keys by their name in the text; none: the reward and each of its components.
    """
    if len(history) < MIN_STEPS:
        number = "1 step is" if len(history) == 1 else f"{len(history)} steps are"
        return [f"{number} too few to compare the first quarter with the last (at least {MIN_STEPS})."]
    names = dict(metrics or _reward_names(history))
    size, subject = len(history) // 4, "Training" if metrics else "Training reward"
    lines = [f"{subject}, first {size} steps -> last {size} steps (+- two standard errors):"]
    width = max(map(len, names))
    for name, key in names.items():
        change = quarter_change([step.get(key) for step in history])
        lines.append(f"  {name.ljust(width)}  {_change_text(change)}")
    return lines + _health_lines(history)


def _reward_names(history: Sequence[Mapping[str, float | None]]) -> dict[str, str]:
    keys = dict.fromkeys(key for step in history for key in step)
    return {"reward": "reward/mean"} | {name: f"reward/{name}" for name in component_names(keys)}


def accuracy_lines(change: AccuracyChange) -> list[str]:
    """Accuracy before and after with 95% intervals, and whether the difference is larger than chance."""
    before, after = change.correct_before / change.num_before, change.correct_after / change.num_after
    return [
        f"Accuracy on {change.name}, 95% intervals: "
        f"{_share_text(change.correct_before, change.num_before)} -> "
        f"{_share_text(change.correct_after, change.num_after)}, {100 * (after - before):+.1f} points.",
        _chance_sentence(change),
    ]


def phase_lines(phase_seconds: Mapping[str, float]) -> list[str]:
    """Time by phase, longest first, with shares."""
    total = sum(phase_seconds.values())
    width = max((len(name) for name in phase_seconds), default=0)
    ordered = sorted(phase_seconds.items(), key=lambda item: -item[1])
    return [
        f"{name.ljust(width)}  {format_duration(seconds):>6}  {format_fraction(seconds / total):>4}"
        for name, seconds in ordered
        if total > 0
    ]


def _change_text(change: QuarterChange | None) -> str:
    if change is None:
        return "too few values to compare"
    return (
        f"{change.first:7.3f} -> {change.last:7.3f}  {change.difference:+.3f} +- {change.two_standard_errors:.3f}"
        f"  {change.verdict}"
    )


def _health_lines(history: Sequence[Mapping[str, float | None]]) -> list[str]:
    """What a reader must know before trusting the numbers; nothing if all is well."""
    notes = {
        "reward/error_frac": "of rollouts had a verifier that broke; they were left out, not scored 0",
        "reward/timeout_frac": "of rollouts had a verifier that timed out; they were left out, not scored 0",
        "completion/truncated_frac": "of completions were cut at the token limit",
        "groups/no_signal_frac": "of groups had equal rewards and taught nothing",
    }
    lines = []
    for key, note in notes.items():
        values = _finite([metrics.get(key) for metrics in history])
        if values and _mean(values) > 0:
            lines.append(f"  {format_fraction(_mean(values), 1)} {note}.")
    return lines


def _share_text(correct: int, num: int) -> str:
    low, high = wilson_interval(correct, num)
    return f"{100 * correct / num:.1f}% ({100 * low:.1f} to {100 * high:.1f}, {correct} of {num})"


def _chance_sentence(change: AccuracyChange) -> str:
    if change.num_gained is not None and change.num_lost is not None:
        p = sign_test_p(change.num_gained, change.num_lost)
        is_real, sign = p < SIGNIFICANCE, change.num_gained - change.num_lost
        proof = f"{change.num_gained} problems gained, {change.num_lost} lost, exact sign test p = {_p_text(p)}"
    else:
        low, high = difference_interval(
            change.correct_before, change.num_before, change.correct_after, change.num_after
        )
        is_real, sign = low > 0 or high < 0, low + high
        proof = f"95% interval of the difference {100 * low:+.1f} to {100 * high:+.1f} points"
    if not is_real:
        return f"The difference is NOT larger than chance could make it ({proof})."
    return f"The model got {'better' if sign > 0 else 'WORSE'} by more than chance explains ({proof})."


def _p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
