"""Which curves a report draws, and their points. Only what a run recorded becomes a curve."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlbench.report.run_folder import RunRecord
from rlbench.tracking.metrics import component_names, metric_spec

Row = Mapping[str, Any]
MAX_POINTS = 600  # of one curve; longer runs show means of neighbouring steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Values over steps; None breaks the line.

    Example:
        Curve(label="mean", steps=[1, 2], values=[0.1, 0.2], low=[0.0, 0.1], high=[0.2, 0.3])
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float | None]
    low: Sequence[float | None] = ()  # of a band or of error bars
    high: Sequence[float | None] = ()
    is_points: bool = False  # evaluations: marks with error bars instead of a line with a band
    colour: int | None = None  # None: by its place in the chart


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    title: str
    unit: str
    curves: Sequence[Curve]
    note: str = ""
    is_stacked: bool = False
    limits: Mapping[str, float] = field(default_factory=dict)  # horizontal lines by label
    is_share: bool = False  # values in [0, 1], shown as percent
    starts_at_zero: bool = True


def number(value: Any) -> float | None:
    """A finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def column(rows: Sequence[Row], key: str) -> list[float | None]:
    return [number(row.get(key)) for row in rows]


def has_values(curve: Curve) -> bool:
    return any(value is not None for value in curve.values)


def curve(rows: Sequence[Row], key: str, label: str | None = None, **options: Any) -> Curve:
    """A key's values over the rows' steps."""
    steps = [float(row["step"]) for row in rows]
    return Curve(label=label or metric_spec(key).label, steps=steps, values=column(rows, key), **options)


def charts_of(run: RunRecord) -> tuple[list[Chart], list[str]]:
    """All charts that have something to show, and the titles of those that are zero throughout."""
    charts = [_reward(run), _components(run), _accuracy(run), _length(run)]
    charts += [_plain(run.train, *spec) for spec in _PLAIN]
    charts += [_drift(run), _grad_norm(run), _times(run), _memory(run)]
    shown, zero = [], []
    for chart in charts:
        curves = [c for c in chart.curves if has_values(c)]
        if not curves:
            continue
        if any(value for c in curves for value in c.values if value is not None):
            shown.append(replace(chart, curves=[thin(c) for c in curves]))
        else:
            zero.append(chart.title)
    return shown, zero


# title, unit, curves by key, is it a share, does the axis start at zero
_PLAIN: list[tuple[str, str, dict[str, str], bool, bool]] = [
    ("Completions cut at the limit", "share", {"completion/truncated_frac": "cut"}, True, True),
    ("Groups without signal", "share", {"groups/no_signal_frac": "equal rewards"}, True, True),
    ("Curriculum", "share of prompts",
     {"curriculum/measured_frac": "sampled so far", "curriculum/expected_signal_frac": "drawn, expected to teach"},
     True, True),
    ("Replayed successes", "share of groups", {"replay/groups_frac": "with a replayed completion"}, True, True),
    ("Age of replayed successes", "policy versions", {"replay/age_mean": "mean", "replay/age_max": "oldest"},
     False, True),
    ("Verifier failures", "share of rollouts",
     {"reward/error_frac": "broke", "reward/timeout_frac": "timed out", "rollouts/invalid_frac": "no reward"},
     True, True),
    ("Entropy", "nats/token", {"policy/entropy": "policy"}, False, True),
    ("KL", "nats/token", {"kl/reference": "to the reference policy", "policy/kl_to_old": "moved by one step"},
     False, True),
    ("Clip share", "share of tokens",
     {"loss/clip_frac": "clipped by the loss", "importance/outside_frac": "importance weight bounded"}, True, True),
    ("Loss", "", {"loss/total": "total"}, False, False),
    ("Learning rate", "", {"optim/lr": "learning rate"}, False, True),
    ("Tokens a second", "tokens/s", {"tokens/generation_per_s": "generated", "tokens/training_per_s": "trained"},
     False, True),
]  # fmt: skip


def _plain(rows: Sequence[Row], title: str, unit: str, keys: Mapping[str, str], share: bool, zero: bool) -> Chart:
    curves = [curve(rows, key, label) for key, label in keys.items()]
    return Chart(title=title, unit=unit, curves=curves, is_share=share, starts_at_zero=zero)


def _combine(a: Sequence[float | None], b: Sequence[float | None], how: Callable[[float, float], float]) -> list:
    return [None if x is None or y is None else how(x, y) for x, y in zip(a, b, strict=True)]


def _reward(run: RunRecord) -> Chart:
    mean, std = column(run.train, "reward/mean"), column(run.train, "reward/std")
    low, high = _combine(mean, std, lambda m, s: m - s), _combine(mean, std, lambda m, s: m + s)
    return Chart(
        title="Reward",
        unit="",
        note="Band: one standard deviation of the step's rollouts to each side.",
        curves=[
            curve(run.train, "reward/mean", "training, mean", low=low, high=high),
            curve(run.evaluations, "eval/reward", "held out, greedy", is_points=True),
        ],
    )


def _components(run: RunRecord) -> Chart:
    names = component_names(dict.fromkeys(key for row in run.train for key in row))
    curves = [curve(run.train, f"reward/{name}", name) for name in names]
    return Chart(title="Reward by component", unit="mean, before weights", curves=curves)


def _accuracy(run: RunRecord) -> Chart:
    rows = run.evaluations
    passes = sorted({key for row in rows for key in row if re.fullmatch(r"eval/pass_at_\d+", key)})
    held_out = {"eval/accuracy": "held out, greedy", "eval/sampled_accuracy": "held out, sampled"}
    held_out |= {key: f"held out, pass@{key.rpartition('_')[2]}" for key in passes}
    found = [_with_interval(rows, key, label) for key, label in held_out.items()]
    return Chart(
        title="Accuracy",
        unit="share right",
        is_share=True,
        note="Held out: bars are 95% intervals." if rows else "",
        curves=[
            curve(run.train, "accuracy/train", "training prompts, sampled"),
            *(points for points in found if has_values(points)),
        ],
    )


def _with_interval(rows: Sequence[Row], key: str, label: str) -> Curve:
    """Points of evaluations, with their bars."""
    return curve(rows, key, label, low=column(rows, f"{key}_low"), high=column(rows, f"{key}_high"), is_points=True)


def _length(run: RunRecord) -> Chart:
    low = column(run.train, "completion/length_tokens_min")
    high = column(run.train, "completion/length_tokens_max")
    return Chart(
        title="Completion length",
        unit="tokens",
        note="Band: shortest to longest.",
        curves=[
            curve(run.train, "completion/length_tokens_mean", "training, mean", low=low, high=high),
            curve(run.evaluations, "eval/length_tokens_mean", "held out, mean", is_points=True),
        ],
    )


def _drift(run: RunRecord) -> Chart:
    checks = run.config.get("checks")
    limits = {name: number(checks.get(f"drift_{name}_nats")) for name in ("warn", "stop")} if isinstance(
        checks, Mapping) else {}  # fmt: skip
    return Chart(
        title="Drift: trainer against engine",
        unit="nats/token",
        note="Mean difference of the two sides' logprobs of the sampled tokens.",
        curves=[curve(run.train, "drift/logprob_gap_mean", "mean gap")],
        limits={name: limit for name, limit in limits.items() if limit is not None},
    )


def _grad_norm(run: RunRecord) -> Chart:
    optim = run.config.get("optim")
    limit = number(optim.get("max_grad_norm")) if isinstance(optim, Mapping) else None
    norms = curve(run.train, "optim/grad_norm", "before clipping")
    return Chart(title="Gradient norm", unit="norm", curves=[norms], limits={"clipped at": limit} if limit else {})


def phase_keys(rows: Sequence[Row]) -> list[str]:
    """`time/<phase>_s` keys in the order of appearance, without the step's total."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key for key in keys if key.startswith("time/") and key.endswith("_s") and key != "time/step_s"]


def _times(run: RunRecord) -> Chart:
    keys = phase_keys(run.train)
    totals = {key: sum(value or 0.0 for value in column(run.train, key)) for key in keys}
    ordered = sorted(keys, key=lambda key: -totals[key])
    curves = [
        curve(run.train, key, key.removeprefix("time/").removesuffix("_s").replace("_", " ")) for key in ordered[:7]
    ]
    curves = [_zero_filled(c) for c in curves if has_values(c)]
    return Chart(title="Time of a step by phase", unit="s", curves=curves, is_stacked=True)


def _zero_filled(given: Curve) -> Curve:
    """In a stack a phase that a step did not have took no time."""
    return Curve(label=given.label, steps=given.steps, values=[value or 0.0 for value in given.values])


def _memory(run: RunRecord) -> Chart:
    keys = dict.fromkeys(key for row in run.train for key in row if key.startswith("memory/"))
    names = {key: key.removeprefix("memory/").removesuffix("_gib").replace("_", " ") for key in keys}
    curves = [curve(run.train, key, name) for key, name in names.items()]
    return Chart(title="Highest memory by phase", unit="GiB", curves=curves)


def thin(given: Curve, max_points: int = MAX_POINTS) -> Curve:
    """At most `max_points` points: means of equally many neighbouring steps, bands likewise."""
    size = math.ceil(len(given.steps) / max_points)
    if size <= 1:
        return given

    def means(values: Sequence[float | None]) -> list[float | None]:
        blocks = [[v for v in values[i : i + size] if v is not None] for i in range(0, len(values), size)]
        return [sum(block) / len(block) if block else None for block in blocks]

    steps = [step for step in means(given.steps) if step is not None]
    low, high = means(given.low), means(given.high)
    return replace(given, steps=steps, values=means(given.values), low=low, high=high)
