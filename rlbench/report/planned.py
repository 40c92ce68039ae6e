"""What plan.json said before the run, beside what the run recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlbench.report.curves import column, number
from rlbench.report.markup import Html, join, tag
from rlbench.report.run_folder import RunRecord
from rlbench.report.sections import table
from rlbench.tracking.formats import format_duration

_PHASES = ("generation", "update")
_RESIDENT = (
    "Resident memory of a CPU's process counts what was freed and kept for later, so that generation after an update "
    "shows the update's: here generation is that of the first step."
)


def planned_and_actual(run: RunRecord) -> Html | None:
    """Memory and time by phase with the deviation, and the planned peak by part; None without a plan or steps."""
    plan = run.plan.get("plan")
    if not isinstance(plan, Mapping) or not run.train:
        return None
    rows = [*_memory_rows(run, plan), *_time_rows(run, plan)]
    if not rows:
        return None
    columns = ("what", "planned, at most", "actual, highest step", "actual less planned", "actual, mean")
    notes = [tag("p", f"Source of the plan: {run.plan.get('source', 'not recorded')}.", class_="quiet")]
    if run.plan.get("kind") == "resident memory":
        notes.append(tag("p", _RESIDENT, class_="quiet"))
    return join(*notes, table(columns, rows), _parts(plan))


def deviation(planned: float | None, actual: float | None) -> str:
    """Of the actual value from the planned one: "+4.2%"; "" where one of them is missing."""
    return f"{100 * (actual / planned - 1):+.1f}%" if planned and actual is not None else ""


def _memory_rows(run: RunRecord, plan: Mapping[str, Any]) -> list[Html]:
    planned = {name: number(plan.get(f"{name}_peak_gib")) for name in _PHASES}
    planned["peak"] = number(plan.get("peak_gib"))
    rows = []
    for name, value in planned.items():
        is_kept = name == "generation" and run.plan.get("kind") == "resident memory"
        steps = run.train[:1] if is_kept else run.train
        actual = [v for v in column(steps, f"memory/{name}_gib") if v is not None]
        rows.append(_row(f"memory, {name}", value, actual, lambda gib: f"{gib:.2f} GiB"))
    return [row for row in rows if row is not None]


def _time_rows(run: RunRecord, plan: Mapping[str, Any]) -> list[Html]:
    times = plan.get("time_s")
    times = times if isinstance(times, Mapping) else {}
    rows = []
    for name in _PHASES:
        actual = [v for v in column(run.train, f"time/{name}_s") if v is not None]
        rows.append(_row(f"time, {name}", number(times.get(name)), actual, format_duration))
    return [row for row in rows if row is not None]


def _row(name: str, planned: float | None, actual: list[float], show: Any) -> Html | None:
    if planned is None and not actual:
        return None
    highest = max(actual, default=None)
    cells = (
        "not planned" if planned is None else show(planned),
        "not recorded" if highest is None else show(highest),
        deviation(planned, highest),
        show(sum(actual) / len(actual)) if actual else "",
    )
    return tag("tr", tag("th", name, scope="row"), *(tag("td", cell, class_="number") for cell in cells))


def _parts(plan: Mapping[str, Any]) -> Html | None:
    memory = plan.get("memory_gib")
    parts = {name: number(gib) for name, gib in memory.items()} if isinstance(memory, Mapping) else {}
    known = {name: gib for name, gib in parts.items() if gib is not None}
    total = sum(known.values())
    if not total:
        return None
    rows = [
        tag("tr", tag("th", name, scope="row"), tag("td", f"{gib:.2f}", class_="number"),
            tag("td", f"{100 * gib / total:.0f}%", class_="number"))
        for name, gib in sorted(known.items(), key=lambda item: -item[1])
    ]  # fmt: skip
    paged = number(plan.get("paged_gib"))
    notes = [tag("p", f"Beside it {paged:.2f} GiB of optimizer state, paged: the driver moves it to host memory where "
                      "the device is full.", class_="quiet")] if paged else []  # fmt: skip
    return tag("details", tag("summary", f"The planned peak of {total:.2f} GiB by part"),
               table(("part", "GiB", "share"), rows), *notes)  # fmt: skip
