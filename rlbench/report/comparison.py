"""Several runs on one page: curves over each other, results and settings side by side, findings of each."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rlbench.checks.health import RULES, Finding
from rlbench.report import sections
from rlbench.report.curves import Chart, column, curve, has_values, number, thin
from rlbench.report.markup import Html, join, tag
from rlbench.report.page import render_page
from rlbench.report.rollout_files import RolloutFile, read_files
from rlbench.report.run_folder import METRICS_FILE, RunRecord, load_run
from rlbench.report.run_report import findings_of, write_page
from rlbench.tracking.formats import format_duration
from rlbench.tracking.intervals import sign_test_p
from rlbench.tracking.jsonl import read_metrics
from rlbench.tracking.metrics import component_names, metric_spec
from rlbench.tracking.run_summary import quarter_change

FILE_NAME = "comparison.html"
MAX_RUNS = 24  # on a page: more cannot be told apart
KEYS = ("reward/mean", "accuracy/train", "eval/accuracy", "eval/reward", "completion/length_tokens_mean",
         "completion/truncated_frac", "groups/no_signal_frac", "policy/entropy", "kl/reference", "loss/clip_frac",
         "drift/logprob_gap_mean", "optim/grad_norm", "optim/lr", "loss/total", "time/step_s",
         "tokens/generation_per_s", "tokens/training_per_s")  # fmt: skip
_NOT_COMPARED = ("resume",)  # says how a run began, not what it is


@dataclass(frozen=True, slots=True)
class Compared:
    """A run with what its rollouts say."""

    label: str
    run: RunRecord
    findings: list[Finding]
    is_correct: Mapping[str, bool]  # by prompt, in the last evaluation
    notes: tuple[str, ...]


def write_comparison(folders: Sequence[Path], out: Path | None = None, note: str = "") -> Path:
    """Write the page of several runs.

    Args:
        folders: of the runs, as `choose_runs` takes them; the first is what the others are compared with.
        out: the file; None is `comparison.html` in the folder that holds all of them.
        note: on the runs that were left out.

    Raises:
        ValueError: one is no run's folder, or there is no place for the page.
        TrackingError: metrics cannot be read or the page cannot be written.
    """
    runs = [load_run(folder) for folder in folders]
    if len({run.folder for run in runs}) < len(runs):
        raise ValueError("a run is given twice, expected different folders")
    common = Path(os.path.commonpath([run.folder.parent for run in runs]))
    if out is None and common == Path(common.anchor):
        raise ValueError("the runs have no folder in common, expected --out FILE")
    compared = [_read(run, label) for run, label in zip(runs, _labels(runs, common), strict=True)]
    return write_page(out or common / FILE_NAME, _page(compared, common, note))


def choose_runs(folders: Sequence[Path], max_runs: int = MAX_RUNS) -> tuple[list[Path], str]:
    """The first run and those whose last quarter of steps has the highest reward; without rewards the first ones.

    Returns:
        At most `max_runs` folders in their order, and a sentence about those that are left out ("" if none is).

    Raises:
        TrackingError: metrics cannot be read.
    """
    if len(folders) <= max_runs:
        return list(folders), ""
    rewards = [_last_reward(folder) for folder in folders]
    best = sorted(range(1, len(folders)), key=lambda i: (-rewards[i], i))[: max_runs - 1]
    return [folders[i] for i in sorted([0, *best])], (
        f"{len(folders) - max_runs} of {len(folders)} runs are left out; shown are the first run and the "
        f"{max_runs - 1} whose reward/mean was highest over the last quarter of their steps"
    )


def _last_reward(folder: Path) -> float:
    change = quarter_change(column(read_metrics(folder / METRICS_FILE, "train"), KEYS[0]))
    return change.last if change else -math.inf


def _labels(runs: Sequence[RunRecord], common: Path) -> list[str]:
    """The shortest path that tells the runs apart."""
    names = [run.folder.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder.relative_to(common)) for run in runs]


def _read(run: RunRecord, label: str) -> Compared:
    files, notes = read_files(run.folder)
    all_notes = tuple(f"{label}: {note}" for note in (*run.notes, *notes))
    return Compared(label, run, findings_of(run, files), last_answers(files), all_notes)


def last_answers(files: Sequence[RolloutFile]) -> dict[str, bool]:
    """Whether each held-out problem was right in the last evaluation; empty without an accuracy reward."""
    last = [file for file in files if file.is_evaluation][-1:]
    table = last[0].read() if last else None
    if table is None or "component_accuracy" not in table.column_names:
        return {}
    pairs = zip(table.column("prompt_id").to_pylist(), table.column("component_accuracy").to_pylist(), strict=True)
    return {prompt: value == 1.0 for prompt, value in pairs if value is not None}


def _page(compared: Sequence[Compared], common: Path, left_out: str) -> str:
    charts = _charts(compared)
    notes = [*([f"{left_out}."] if left_out else []), *(note for item in compared for note in item.notes)]
    results = join(sections.notes_list(notes), _results(compared), _seeds(compared))
    links = [("results", "Results"), ("health", "Health"), ("curves", "Curves"), ("settings", "Settings")]
    tiles = [(item.label, _reward_text(item.run), _accuracy_text(item.run)) for item in compared[:8]]
    parts = [
        sections.section("results", "Results", results),
        sections.section("health", "Health", *(_findings(item) for item in compared)),
        sections.section("curves", "Curves", sections.chart_grid(charts)),
        sections.section("settings", "Settings that differ", _differences(compared)),
    ]
    head = sections.header(f"{len(compared)} runs of {common.name}", tiles, links)
    data = {"charts": [sections.chart_data(chart) for chart in charts]}
    return render_page(f"{common.name}: comparison", [head, tag("main", *parts)], data)


def _charts(compared: Sequence[Compared]) -> list[Chart]:
    keys = dict.fromkeys(key for item in compared for row in item.run.train for key in row)
    names = component_names(keys) if len(component_names(keys)) > 1 else []
    wanted = [KEYS[0], *(f"reward/{name}" for name in names if name != "accuracy"), *KEYS[1:]]
    charts = [_chart(compared, key) for key in wanted]
    return [chart for chart in charts if any(v for c in chart.curves for v in c.values if v is not None)]


def _chart(compared: Sequence[Compared], key: str) -> Chart:
    is_evaluation = key.startswith("eval/")
    curves = []
    for index, item in enumerate(compared):
        rows = item.run.evaluations if is_evaluation else item.run.train
        bounds = {"low": column(rows, f"{key}_low"), "high": column(rows, f"{key}_high")} if is_evaluation else {}
        curves.append(curve(rows, key, item.label, is_points=is_evaluation, colour=index, **bounds))
    spec = metric_spec(key)
    known = [thin(c) for c in curves if has_values(c)]
    title = spec.label[:1].upper() + spec.label[1:]
    return Chart(title=title, unit=spec.unit, curves=known, is_share=spec.unit == "share",
                 starts_at_zero=not key.startswith("loss/t"))  # fmt: skip


def _results(compared: Sequence[Compared]) -> Html:
    rows = []
    for item in compared:
        seconds = sum(v for v in column(item.run.train, "time/step_s") if v is not None)
        cells = (
            str(item.run.train[-1]["step"] if item.run.train else 0),
            _reward_text(item.run),
            _accuracy_text(item.run),
            _paired_text(compared[0], item),
            format_duration(seconds) if seconds else "",
        )
        names = [tag("div", f"{f.severity}: {f.title}") for f in item.findings] or ["nothing found"]
        rows.append(tag("tr", tag("th", item.label, scope="row"), *(tag("td", cell) for cell in cells),
                        tag("td", *names, class_="finding-names")))  # fmt: skip
    columns = ("run", "steps", "reward, first and last quarter", "held-out accuracy (95%)",
               f"same problems, against {compared[0].label}", "time of steps", "findings")  # fmt: skip
    return sections.table(columns, rows, class_="wide")


def _reward_text(run: RunRecord) -> str:
    change = quarter_change(column(run.train, "reward/mean"))
    return f"{change.first:.3f} → {change.last:.3f}" if change else ""


def _accuracy_text(run: RunRecord) -> str:
    names = ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high")
    rows = [found for row in run.evaluations if (found := [number(row.get(name)) for name in names])[0] is not None]
    if not rows:
        return ""
    accuracy, low, high = rows[-1]
    text = f"{100 * (accuracy or 0.0):.1f}%"
    return text if low is None or high is None else f"{text} ({100 * low:.1f} to {100 * high:.1f})"


def _paired_text(first: Compared, other: Compared) -> str:
    both = first.is_correct.keys() & other.is_correct.keys()
    if first is other or not both:
        return ""
    return paired_text(first.is_correct, other.is_correct)


def paired_text(before: Mapping[str, bool], after: Mapping[str, bool]) -> str:
    """What was gained and lost on the same problems, and whether that is more than chance."""
    both = before.keys() & after.keys()
    gained = sum(after[p] and not before[p] for p in both)
    lost = sum(before[p] and not after[p] for p in both)
    p = sign_test_p(gained, lost)
    verdict = "no more than chance" if p >= 0.05 else "better" if gained > lost else "worse"
    return f"{gained} gained, {lost} lost of {len(both)}, p = {p:.2g}: {verdict}"


def _seeds(compared: Sequence[Compared]) -> Html | None:
    """Last-quarter reward by setting, over seeds; nothing if no setting was run with several seeds."""
    differing = [key for key in _differing(compared) if key != "seed"]
    groups: dict[tuple[str, ...], list[float]] = {}
    for item in compared:
        change, values = quarter_change(column(item.run.train, "reward/mean")), compared_settings(item.run)
        if change is not None:
            groups.setdefault(tuple(values.get(key, "not set") for key in differing), []).append(change.last)
    if max((len(found) for found in groups.values()), default=0) < 2:
        return None
    rows = []
    for key, found in sorted(groups.items(), key=lambda entry: -fmean(entry[1])):
        name = ", ".join(f"{k}={v}" for k, v in zip(differing, key, strict=True)) or "all runs (only the seed differs)"
        spread = f"± {stdev(found):.3f}" if len(found) > 1 else "one run: no spread known"
        cells = (str(len(found)), f"{fmean(found):.3f} {spread}", f"{min(found):.3f} to {max(found):.3f}")
        rows.append(tag("tr", tag("th", name, scope="row"), *(tag("td", cell) for cell in cells)))
    columns = ("settings", "runs", "reward of the last quarter, mean ± standard deviation", "range")
    return join(tag("h3", "By settings, over seeds"), sections.table(columns, rows))


def _findings(item: Compared) -> Html:
    listed = sections.findings_list(item.findings, len(RULES), heading="h4")
    return tag("details", tag("summary", f"{item.label}: {len(item.findings)} findings"), listed)


def compared_settings(run: RunRecord) -> dict[str, str]:
    """Every setting that says what the run is, by its dotted key."""
    return {key: sections.plain(value) for key, value in sections.flatten(run.config) if key not in _NOT_COMPARED}


def _differing(compared: Sequence[Compared]) -> list[str]:
    """Keys whose values are not the same in all runs."""
    values: list[dict[str, Any]] = [compared_settings(item.run) for item in compared]
    keys = dict.fromkeys(key for found in values for key in found)
    return [key for key in keys if len({found.get(key) for found in values}) > 1]


def _differences(compared: Sequence[Compared]) -> Html:
    keys = _differing(compared)
    if not keys:
        return tag("p", "All settings are the same.")
    values = [compared_settings(item.run) for item in compared]
    rows = []
    for key in keys:
        cells = [tag("td", found.get(key, "not set"), class_="value") for found in values]
        rows.append(tag("tr", tag("th", tag("code", key), scope="row"), *cells))
    return sections.table(("setting", *(item.label for item in compared)), rows, class_="wide")
