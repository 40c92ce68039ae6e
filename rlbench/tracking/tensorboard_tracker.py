"""TensorBoard as a sink: event files in the run's folder."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from rlbench.tracking.errors import TrackingError
from rlbench.tracking.jsonl import write_all

FOLDER = "tensorboard"
_FILE_VERSION = "brain.Event:2"


def check_tensorboard() -> None:
    """
    Raises:
        ValueError: the package is not installed.
    """
    if find_spec("tensorboard") is None:
        raise ValueError(
            "tracking.tensorboard is true, but the package tensorboard is not installed; "
            "expected: pip install 'rlbench[tensorboard]'"
        )


class TensorboardTracker:
    """Writes `<folder>/tensorboard/events.*`; `tensorboard --logdir outputs` shows every run beside the others.

    Not with TensorBoard's own writer: its thread, which meets a full disk first, prints a traceback.

    Args:
        folder: the run's; nothing is made in it before the first `log`.
        steps_done: of a resumed run; TensorBoard then hides what an earlier process wrote beyond them.
    """

    def __init__(self, folder: Path, steps_done: int = 0) -> None:
        now = time.time_ns()  # a later process' file comes after this one: TensorBoard reads them in order of names
        name = f"events.out.tfevents.{now // 10**9:010d}.{now % 10**9:09d}.{os.getpid()}"
        self.path = folder / FOLDER / name
        self._steps_done = steps_done
        self._fd: int | None = None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One scalar a metric; what is no finite number is left out. A run that is killed keeps its curves.

        Raises:
            TrackingError: the file cannot be written; it keeps its whole records, and takes no more.
        """
        try:
            if self._fd is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
                _append(self._fd, _opening(self._steps_done))
            _append(self._fd, _scalars(step, metrics))
        except OSError as error:
            self.finish()
            raise TrackingError.from_os_error(f"write the curves of step {step} to", self.path, error) from error

    def finish(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _append(fd: int, records: bytes) -> None:
    """All of them, or none."""
    end = os.fstat(fd).st_size
    try:
        write_all(fd, records)
    except OSError:
        with suppress(OSError):  # the write's own error is the one to report
            os.ftruncate(fd, end)
        raise


def _opening(steps_done: int) -> bytes:
    """What a file begins with."""
    event_pb2 = _protocol("event")
    first: list[dict[str, Any]] = [{"file_version": _FILE_VERSION}]
    if steps_done:
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        first.append({"step": steps_done + 1, "session_log": start})
    return b"".join(map(_record, first))


def _scalars(step: int, metrics: Mapping[str, Any]) -> bytes:
    summary_pb2 = _protocol("summary")
    values = [
        summary_pb2.Summary.Value(tag=key, simple_value=value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    return _record({"step": step, "summary": summary_pb2.Summary(value=values)})


def _record(event: Mapping[str, Any]) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    found = BytesIO()
    RecordWriter(found).write(_protocol("event").Event(wall_time=time.time(), **event).SerializeToString())
    return found.getvalue()


def _protocol(name: str) -> Any:
    """Of TensorBoard's modules of messages, whose classes no type checker sees."""
    return import_module(f"tensorboard.compat.proto.{name}_pb2")
