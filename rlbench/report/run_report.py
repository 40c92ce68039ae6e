"""The report of one run: read its folder, judge it, write the page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlbench.checks.health import RULES, Finding, find_problems
from rlbench.config.schema import DataConfig, ModelConfig
from rlbench.report import sections
from rlbench.report.curves import charts_of
from rlbench.report.explorer import explorer
from rlbench.report.markup import Html, join, tag
from rlbench.report.page import render_page
from rlbench.report.planned import planned_and_actual
from rlbench.report.rollout_files import RolloutFile, choose, metrics_by_step, read_files
from rlbench.report.run_folder import RunRecord, load_run
from rlbench.report.samples import Samples, pack_samples
from rlbench.report.token_pieces import Vocabulary, read_vocabulary
from rlbench.tracking.errors import TrackingError

MAX_ROLLOUTS = 10_000
MAX_TOKENS = 8_000_000
FILE_NAME = "report.html"


def write_run_report(folder: str | Path, out: Path | None = None, max_rollouts: int = MAX_ROLLOUTS) -> Path:
    """Write the page of a run.

    Args:
        folder: of the run.
        out: the file; None is `report.html` in the run's folder.
        max_rollouts: most rollouts that the page holds.

    Raises:
        ValueError: it is no run's folder.
        TrackingError: metrics cannot be read or the page cannot be written.
    """
    run = load_run(folder)
    files, notes = read_files(run.folder)
    shown = choose(files, max_rollouts, MAX_TOKENS)
    vocabulary = find_vocabulary(run) if shown else None
    samples = pack_samples(shown, vocabulary, _answer_column(run))
    if not files:
        notes.append("There are no rollouts to show (tracking.save_rollouts).")
    page = _page(run, files, samples, has_tokens=vocabulary is not None, notes=[*run.notes, *notes])
    return write_page(out or run.folder / FILE_NAME, page)


def write_page(path: Path, page: str) -> Path:
    """Write by temporary name and rename.

    Raises:
        TrackingError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)
        raise TrackingError.from_os_error("write the report to", path, error) from error
    return path


def findings_of(run: RunRecord, files: Sequence[RolloutFile]) -> list[Finding]:
    """Health findings, with what the rollouts add to the metrics."""
    more = metrics_by_step(files)
    train = [{**row, **more.get(row["step"], {})} for row in run.train]
    return find_problems(train, run.evaluations, run.config)


def find_vocabulary(run: RunRecord) -> Vocabulary | None:
    """Of the model that the config names, if its files are on this machine."""
    from rlbench.models.source import find_local_model

    saved = run.config.get("model")
    if not isinstance(saved, Mapping):
        return None
    try:
        model = find_local_model(ModelConfig(path=saved.get("path"), cache_dir=saved.get("cache_dir", "~")))
    except (OSError, ValueError, TypeError):
        return None
    return read_vocabulary(model) if model else None


def _answer_column(run: RunRecord) -> str:
    saved = run.config.get("data")
    name = saved.get("answer_column") if isinstance(saved, Mapping) else None
    return str(name or DataConfig.answer_column)


def _page(
    run: RunRecord, files: Sequence[RolloutFile], samples: Samples, *, has_tokens: bool, notes: Sequence[str]
) -> str:
    charts, zero = charts_of(run)
    num_rollouts, num_shown = sum(file.num_rollouts for file in files), len(samples.index["step"])
    links = [("health", "Health"), ("curves", "Curves"), ("settings", "Settings"), ("files", "Files")]
    parts: list[Html | None] = [
        sections.section("health", "Health", sections.notes_list(notes),
                         sections.findings_list(findings_of(run, files), len(RULES))),
        sections.section("curves", "Curves", sections.chart_grid(charts, zero), sections.all_metrics(run)),
    ]  # fmt: skip
    if num_shown:
        parts.append(sections.section("samples", "Samples", explorer(num_shown, num_rollouts, has_tokens)))
        links.insert(2, ("samples", "Samples"))
    planned = planned_and_actual(run)
    if planned:
        parts.append(sections.section("plan", "Planned and actual", planned))
        links.insert(-2, ("plan", "Planned and actual"))
    parts.append(sections.section("settings", "Settings", _settings(run)))
    environment = sections.environment_table(run.environment)
    if environment:
        parts.append(sections.section("environment", "Environment", environment))
        links.insert(-1, ("environment", "Environment"))
    where = tag("p", tag("code", str(run.folder)))
    parts.append(sections.section("files", "Files", where, sections.files_table(run.files)))
    data: dict[str, Any] = {"charts": [sections.chart_data(chart) for chart in charts], "samples": samples.index}
    head = sections.header(run.name, sections.key_numbers(run), links)
    return render_page(f"{run.name}: report", [head, tag("main", *parts)], data, samples.chunks)


def _settings(run: RunRecord) -> Html:
    if not run.config:
        return tag("p", "There is no config.yaml to show.", class_="quiet")
    num_derived = len(run.derived)
    rows = sections.settings_table(run.config, run.derived)
    return join(tag("p", f"{num_derived} were derived when the run started.", class_="quiet"),
                tag("details", tag("summary", "All settings"), rows, open=True))  # fmt: skip
