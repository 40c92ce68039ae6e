"""What a run left on the disk, read for its report. Whatever is missing is left out and, if it matters, said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlbench.tracking.errors import TrackingError
from rlbench.tracking.jsonl import read_metrics, unreadable_lines

METRICS_FILE = "metrics.jsonl"
_MAX_NAMED = 5  # damaged lines, or runs


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run.

    Example:
        load_run("outputs/grpo_gsm8k/2026-11-24_10-00-00").train[-1]["reward/mean"]
    """

    folder: Path
    train: list[dict[str, Any]]  # metrics of each step
    evaluations: list[dict[str, Any]]
    config: Mapping[str, Any] = field(default_factory=dict)
    derived: Mapping[str, Any] = field(default_factory=dict)  # config key -> {"value": ..., "reason": ...}
    environment: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)  # plan.json: "source", "kind", "plan": a MemoryPlan's fields
    files: tuple[tuple[str, int], ...] = ()  # relative path or folder, bytes
    notes: tuple[str, ...] = ()  # what could not be read, one sentence each

    @property
    def name(self) -> str:
        """The experiment's name and the folder's: what tells runs of a sweep apart."""
        experiment = self.config.get("name")
        return f"{experiment} {self.folder.name}" if experiment and experiment != self.folder.name else self.folder.name


def load_run(folder: str | Path) -> RunRecord:
    """Read a run's folder, also of a run that is still going.

    Raises:
        ValueError: there is no such folder, it is no run's, or no line of its metrics is whole.
        TrackingError: its metrics cannot be read.
    """
    place = Path(folder).expanduser().resolve()
    if not place.is_dir():
        wrong = f"{folder} is a file" if place.exists() else f"there is no folder {folder}"
        raise ValueError(f"{wrong}, expected the folder of a run")
    path = place / METRICS_FILE
    if not path.is_file():
        below = sorted(file.parent.name for file in place.glob(f"*/{METRICS_FILE}"))[:_MAX_NAMED]
        hint = f"; runs below it are {', '.join(below)}" if below else ""
        raise ValueError(f"{folder} is not the folder of a run: it has no {METRICS_FILE}{hint}")
    rows, unreadable = read_metrics(path), unreadable_note(place)
    notes = [unreadable] if unreadable else []
    if not rows and unreadable:
        raise ValueError(
            f"{path} holds no metrics: line {unreadable_lines(path)[0]} is no JSON object with step and phase, and no "
            "other line is one; expected a file that a run has written"
        )
    if not rows:
        notes.append(f"{METRICS_FILE} holds no metrics yet.")
    return RunRecord(
        folder=place,
        train=[row for row in rows if row.get("phase") == "train"],
        evaluations=[row for row in rows if row.get("phase") == "eval"],
        config=_mapping(place / "config.yaml", notes),
        derived=_mapping(place / "derived.json", notes),
        environment=_mapping(place / "environment.json", notes),
        plan=_mapping(place / "plan.json", notes),
        files=_files(place),
        notes=tuple(notes),
    )


def unreadable_note(folder: Path) -> str:
    """How many lines of the run's metrics are damaged, a sentence; empty if none is.

    Raises:
        TrackingError: they cannot be read.
    """
    found = unreadable_lines(folder / METRICS_FILE)
    if not found:
        return ""
    lines = f"1 line of {METRICS_FILE} was" if len(found) == 1 else f"{len(found)} lines of {METRICS_FILE} were"
    numbers = ", ".join(map(str, found[:_MAX_NAMED])) + (", ..." if len(found) > _MAX_NAMED else "")
    return f"{lines} unreadable and left out: line {numbers}."


def find_runs(folder: str | Path) -> list[Path]:
    """The folder itself if it is a run's, else the runs right below it (a sweep's folder), by name.

    Raises:
        ValueError: there is none.
    """
    place = Path(folder).expanduser()
    if not place.is_dir() or (place / METRICS_FILE).exists():
        return [place]
    below = sorted(entry for entry in place.iterdir() if (entry / METRICS_FILE).is_file())
    if not below:
        raise ValueError(f"{folder} is not the folder of a run: it has no {METRICS_FILE}, and neither has one below it")
    return below


def _mapping(path: Path, notes: list[str]) -> Mapping[str, Any]:
    """A JSON or YAML file that holds a mapping; empty, with a note, if it is damaged; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        value = None
    if not isinstance(value, Mapping):
        notes.append(f"{path.name} is damaged and was left out.")
        return {}
    return value


def _files(folder: Path) -> tuple[tuple[str, int], ...]:
    """Entries of the folder with the bytes that each holds."""
    try:
        entries = sorted(folder.iterdir())
        return tuple((e.name + ("/" if e.is_dir() else ""), _size(e)) for e in entries if e.name != "report.html")
    except OSError as error:
        raise TrackingError.from_os_error("list the files of", folder, error) from error


def _size(entry: Path) -> int:
    files = entry.rglob("*") if entry.is_dir() else [entry]
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())
