"""One process writes to a run's folder: a lock that its end releases, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

from rlbench.tracking.errors import TrackingError


class RunLock:
    """Holds `run.lock` of a run's folder from the start to `release`. Where files cannot be locked, nothing is held.

    Raises:
        ValueError: another process holds it; it is named.
        TrackingError: the file cannot be made.
    """

    def __init__(self, run_folder: Path) -> None:
        path = run_folder / "run.lock"
        try:
            self._file = path.open("a+")
        except OSError as error:
            raise TrackingError.from_os_error("make", path, error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{run_folder} is being written by {self._holder()}; expected one run a folder"
                ) from error
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        self._file.flush()

    def release(self) -> None:
        self._file.close()

    def _holder(self) -> str:
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read())
            return f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):
            return "another process"
        finally:
            self._file.close()
