"""`metrics.jsonl`: one JSON object a line, on the disk before `write` returns."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlbench.tracking.errors import TrackingError

PHASES = ("train", "eval")
RESERVED_KEYS = ("step", "phase", "non_finite")


class JsonlWriter:
    """Appends lines `{"step": 12, "phase": "train", ...}`; each is flushed and fsynced.

    A number that JSON lacks (nan, inf) is written as null and its key listed under `non_finite`.

    Args:
        path: the file; its folder is made.
        resume_from_step: None for a new file. Otherwise lines of later steps, which the resumed run will write
            again, and damaged lines (a crash in the middle of a write) are cut; `num_cut_lines` and
            `num_damaged_lines` say how many. -1 cuts all.
        evaluated_to: the same for lines of evaluations, which may have come after what the run goes on from; None:
            `resume_from_step`.

    Raises:
        TrackingError: if the file cannot be opened, or a new run would overwrite an old run's metrics.
    """

    def __init__(self, path: str | Path, resume_from_step: int | None = None, evaluated_to: int | None = None) -> None:
        self.path = Path(path)
        self.num_cut_lines = 0
        self.num_damaged_lines = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_from_step is not None:
                evaluated_to = resume_from_step if evaluated_to is None else evaluated_to
                self._cut({"train": resume_from_step, "eval": evaluated_to})
            elif self.path.exists() and self.path.stat().st_size > 0:
                raise TrackingError(f"{self.path} holds an earlier run's metrics: resume that run or take a new folder")
            self._fd: int | None = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            fsync_folder(self.path.parent)
        except OSError as error:
            raise TrackingError.from_os_error("open", self.path, error) from error

    def write(self, step: int, metrics: Mapping[str, Any], phase: str = "train") -> None:
        """Append one line.

        Args:
            step: optimizer steps applied.
            metrics: numbers (also 0-dimensional arrays and tensors), strings, booleans or None by key.
            phase: "train" or "eval".

        Raises:
            TrackingError: if the line could not be brought to the disk; the file keeps its whole lines.
            ValueError: if a value is of another kind or a key is one of RESERVED_KEYS.
        """
        line = json.dumps(_line(step, metrics, phase), allow_nan=False).encode() + b"\n"
        if self._fd is None:
            raise TrackingError(f"cannot write the metrics of step {step} to {self.path}: the file is closed")
        end = None
        try:
            end = os.fstat(self._fd).st_size
            write_all(self._fd, line)
            os.fsync(self._fd)
        except OSError as error:
            self._drop_partial_line(end)
            raise TrackingError.from_os_error(f"write the metrics of step {step} to", self.path, error) from error

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _drop_partial_line(self, end: int | None) -> None:
        try:
            if end is not None and self._fd is not None:
                os.ftruncate(self._fd, end)
        except OSError:
            pass  # the write's own error is the one to report; a resume cuts the damaged line

    def _cut(self, last: Mapping[str, int]) -> None:
        if not self.path.exists():
            return
        temporary = self.path.with_name(self.path.name + ".tmp")
        with self.path.open("rb") as source, temporary.open("wb") as target:
            for raw in source:
                step = _step_of(raw)
                self.num_damaged_lines += step is None
                if step is None:
                    continue
                if step <= last[json.loads(raw)["phase"]]:
                    target.write(raw.rstrip(b"\r\n") + b"\n")
                else:
                    self.num_cut_lines += 1
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, self.path)


def read_metrics(path: str | Path, phase: str | None = None) -> list[dict[str, Any]]:
    """Lines of a metrics file as dicts, in order; damaged lines are left out.

    Args:
        path: a `metrics.jsonl`, also one that is being written.
        phase: "train" or "eval" for lines of that phase alone.

    Raises:
        TrackingError: if the file cannot be read.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise TrackingError.from_os_error("read the metrics in", Path(path), error) from error
    records = [json.loads(raw) for raw in lines if _step_of(raw) is not None]
    return [record for record in records if phase is None or record.get("phase") == phase]


def unreadable_lines(path: str | Path) -> list[int]:
    """Numbers, from 1, of the damaged lines of a metrics file; half a line at its end, as a crash leaves, is none.

    Raises:
        TrackingError: if the file cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TrackingError.from_os_error("read the metrics in", Path(path), error) from error
    lines = data.splitlines()
    if lines and not data.endswith(b"\n") and b"{" == lines[-1].lstrip()[:1]:
        lines.pop()
    return [number for number, raw in enumerate(lines, start=1) if raw.strip() and _step_of(raw) is None]


def fsync_folder(folder: Path) -> None:
    """Bring new and renamed entries of a folder to the disk (a no-op where folders cannot be opened: Windows)."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    """All of the bytes, though a write may take only a part."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _line(step: int, metrics: Mapping[str, Any], phase: str) -> dict[str, Any]:
    line: dict[str, Any] = {"step": int(step), "phase": phase}
    non_finite = []
    for key, value in metrics.items():
        if key in RESERVED_KEYS:
            raise ValueError(f"metric key {key!r} is reserved in metrics.jsonl; reserved are {RESERVED_KEYS}")
        line[key] = _number_or_text(key, value)
        if isinstance(line[key], float) and not math.isfinite(line[key]):
            line[key] = None
            non_finite.append(key)
    return line | ({"non_finite": non_finite} if non_finite else {})


def _number_or_text(key: str, value: Any) -> float | int | str | bool | None:
    if hasattr(value, "item"):  # numpy scalar, 0-dimensional tensor
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"metric {key!r} must be a number, text, bool or None, got {type(value).__name__}")


def _step_of(raw: bytes) -> int | None:
    """The line's step, or None for a line that is damaged."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):  # also UnicodeDecodeError
        return None
    if not isinstance(record, dict) or record.get("phase") not in PHASES:
        return None
    step, non_finite = record.get("step"), record.get("non_finite", [])
    is_whole = type(step) is int and step >= 0 and isinstance(non_finite, list)  # a bool is no step
    return step if is_whole and all(isinstance(key, str) for key in non_finite) else None
