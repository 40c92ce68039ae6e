"""A run that is killed with signal 9 at a chosen moment: before an operation on a file, in an update, within a line.

A moment is "KIND NTH PATTERN"; the pattern is a regular expression on "operation path", `.` if it does not matter:

    before 2 os.rename .*checkpoints/   before the second rename there
    empty 1 open run/config.yaml        the file is opened for writing, and nothing is in it yet
    update 3 .                          before the third optimizer step of this process
    updated 3 .                         after it
    line 4 .                            half of the fourth line of the metrics of this process is on the disk
    stop 3 .                            no kill: SIGTERM when a step that 3 divides hands in its metrics
"""

import os
import re
import signal
import sys
from pathlib import Path

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree")
PROGRAM = """
import sys
from tests.loops.self_kill import arm
arm({moment!r}, {record!r})
from rlbench.__main__ import main
sys.argv[0] = "rlbench"
sys.exit(main())
"""


def program(moment: str, record: Path | None = None) -> str:
    """For `run` and `start` of the conftest.

    Args:
        moment: "" for a run that is left alone.
        record: of the operations on files below the run's working folder, one a line; None: no record.
    """
    return PROGRAM.format(moment=moment, record=str(record or ""))


def arm(moment: str, record: str) -> None:
    """Before anything of the run happens."""
    kind, nth, pattern = moment.split(" ", 2) if moment else ("", "0", "")
    if kind in ("before", "empty") or record:
        sys.addaudithook(Watch(kind, int(nth), pattern, Path.cwd(), record))
    if kind in ("update", "updated"):
        _kill_in_update(kind, int(nth))
    if kind == "line":
        _kill_in_line(int(nth))
    if kind == "stop":
        _stop_at_step(int(nth))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Watch:
    """Sees every operation that Python does on a file below `root` (what C++ and Rust open is not among them)."""

    def __init__(self, kind: str, nth: int, pattern: str, root: Path, record: str) -> None:
        self.kind, self.left, self.pattern, self.root = kind, nth, re.compile(pattern), f"{root}/"
        self.record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if record else None
        self.process = os.getpid()

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in OPERATIONS or os.getpid() != self.process:
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike) or (
            event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            return
        path = os.fspath(path)
        if not isinstance(path, str) or (path.startswith("/") and not path.startswith(self.root)):
            return
        self.see(f"{event} {path.removeprefix(self.root)}", path)

    def see(self, operation: str, path: str) -> None:
        if self.record is not None:
            os.write(self.record, f"{operation}\n".encode())
        if self.kind not in ("before", "empty") or not self.pattern.match(operation):
            return
        self.left -= 1
        if self.left == 0:
            if self.kind == "empty":
                self.kind = ""  # this `open` is one too
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644))
            kill()


def _kill_in_update(kind: str, nth: int) -> None:
    from torch.optim import optimizer

    left = [nth]

    def count(*_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            kill()

    register = optimizer.register_optimizer_step_pre_hook
    if kind == "updated":
        register = optimizer.register_optimizer_step_post_hook
    register(count)


def _kill_in_line(nth: int) -> None:
    from rlbench.tracking import jsonl

    left, whole = [nth], jsonl.write_all

    def write(fd: int, data: bytes) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.write(fd, data[: len(data) // 2])
            kill()
        whole(fd, data)

    jsonl.write_all = write


def _stop_at_step(divisor: int) -> None:
    from rlbench.tracking.jsonl import JsonlWriter

    whole = JsonlWriter.write

    def write(writer: JsonlWriter, step: int, metrics: dict, phase: str = "train") -> None:
        whole(writer, step, metrics, phase)
        if phase == "train" and step % divisor == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    JsonlWriter.write = write
