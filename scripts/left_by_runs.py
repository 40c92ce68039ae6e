"""What two runs of equal settings leave, file by file; for soak_kills.py."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlbench.report.curves import charts_of
from rlbench.report.rollout_files import read_files
from rlbench.report.run_folder import load_run
from rlbench.report.run_report import findings_of
from rlbench.report.sections import chart_data
from rlbench.tracking.rollout_store import read_rollouts
from rlbench.training.checkpoint import read_checkpoint

_TIMED = re.compile(r"(time|tokens|identity|memory)/|reward_pool/.*|.*(_s|_gib)$")
_TIMED_UNITS = ("s", "tokens/s", "GiB")  # of charts
_OF_THE_PROCESS = {"log.txt", "run.lock", "environment.json", "plan.json"}
_CHECKED = {"manifest.json"}  # of checkpoints: `read_checkpoint` reads it


def differences(alone: Path, killed: Path) -> list[str]:
    """One line for each file that is missing, left over or other than that of the run that was left alone."""
    ours, theirs = names(killed), names(alone)
    found = [f"missing: {name}" for name in sorted(theirs - ours)]
    found += [f"left over: {name}" for name in sorted(ours - theirs)]
    for name in sorted(ours & theirs):
        one, other = (content(folder, name) for folder in (killed, alone))
        if one != other:
            found.append(f"differs: {name}{where(one, other)}")
    return found


def names(run: Path) -> set[str]:
    return {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file() and ".hydra" not in file.parts}


def content(run: Path, name: str) -> Any:
    """Of a file, without what depends on the clock, the process or the folder's place."""
    file = run / name
    if file.name in _CHECKED:
        return read_checkpoint(file.parent).step
    if file.name == "report.html":
        return report(file.parent)
    if file.name in _OF_THE_PROCESS:
        return None
    if file.name == "metrics.jsonl":
        return [untimed(json.loads(line)) for line in file.read_text().splitlines()]
    if file.suffix == ".parquet":
        return read_rollouts(file)
    if file.suffix in (".json", ".yaml"):
        text = file.read_text().replace(str(run), "RUN")
        return of_the_run(yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def of_the_run(value: Any) -> Any:
    """Without what the last call was like: its environment, and what it was told to go on from."""
    if not isinstance(value, Mapping):
        return value
    return {key: of_the_run(item) for key, item in value.items() if key not in ("environment", "resume")}


def report(run: Path) -> Any:
    """What the page of a run draws and says, without times."""
    record = load_run(run)
    charts = [chart_data(chart) for chart in charts_of(record)[0] if chart.unit not in _TIMED_UNITS]
    return {"charts": charts, "findings": [str(found) for found in findings_of(record, read_files(run)[0])]}


def untimed(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not _TIMED.match(key)}


def where(one: Any, other: Any) -> str:
    """The first place where two contents differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            if one.get(key) != other.get(key):
                return f" at {key}{where(one.get(key), other.get(key))}"
    if isinstance(one, list) and isinstance(other, list):
        for number, (mine, theirs) in enumerate(zip(one, other, strict=False)):
            if mine != theirs:
                return f"[{number}]{where(mine, theirs)}"
        return f": {len(one)} entries, not {len(other)}"
    return f": {str(one)[:80]} instead of {str(other)[:80]}"
