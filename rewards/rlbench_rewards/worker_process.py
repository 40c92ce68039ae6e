"""One reward worker seen from outside: a process, two pipes, deadlines, and the kill that ends it."""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from typing import Any

from rlbench_rewards.contract import ERROR
from rlbench_rewards.worker import MAX_FRAME_BYTES

START_DEADLINE_S = 120.0  # importing sympy on a busy machine


class WorkerDied(Exception):
    """The process ended or closed its pipe before it answered."""


class DeadlinePassed(Exception):
    """No answer by the deadline; the worker must be killed."""


class WorkerProcess:
    """One process and its two pipes.

    It must be made in a thread that lives as long as it: Linux signals the parent's death when that thread ends.
    """

    def __init__(self, setup_frame: bytes) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rlbench_rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
            bufsize=0,
        )
        self.num_calls = 0
        self._setup_frame = setup_frame

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_built(self) -> dict[str, str]:
        """What rewards have to say, by name (`note`).

        Raises:
            ValueError: a reward cannot be built.
            RuntimeError: the worker does not start.
        """
        deadline = time.monotonic() + START_DEADLINE_S
        try:
            self._write(self._setup_frame, deadline)
            answer = self._read(deadline)
        except (WorkerDied, DeadlinePassed) as error:
            raise RuntimeError(f"a reward worker did not start ({error})") from error
        if answer["status"] == ERROR:
            raise ValueError(answer["message"])
        return answer["notes"]

    def call(self, frame: bytes, timeout_s: float) -> dict[str, Any]:
        self.num_calls += 1
        deadline = time.monotonic() + timeout_s
        self._write(frame, deadline)
        return self._read(deadline)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """kill -9 of the worker and everything it started in its session; whoever reads from it sees its end."""
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def kill(self) -> None:
        """`end`, and close the pipes: only for the thread that uses the worker, or when no thread does."""
        self.end()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _write(self, frame: bytes, deadline: float) -> None:
        assert self._process.stdin is not None
        descriptor = self._process.stdin.fileno()
        os.set_blocking(descriptor, False)
        view = memoryview(frame)
        while view:
            _, writable, _ = select.select([], [descriptor], [], max(0.0, deadline - time.monotonic()))
            if not writable:
                raise DeadlinePassed
            try:
                view = view[os.write(descriptor, view) :]
            except BrokenPipeError as error:
                raise WorkerDied(self._exit_text()) from error

    def _read(self, deadline: float) -> dict[str, Any]:
        (size,) = struct.unpack(">I", self._read_exactly(4, deadline))
        if size > MAX_FRAME_BYTES:
            raise WorkerDied(f"an answer of {size} bytes")
        return json.loads(self._read_exactly(size, deadline))

    def _read_exactly(self, size: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        data = bytearray()
        while len(data) < size:
            readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise DeadlinePassed
            part = os.read(descriptor, min(size - len(data), 2**20))
            if not part:
                raise WorkerDied(self._exit_text())
            data += part
        return bytes(data)

    def _exit_text(self) -> str:
        try:
            return f"exit status {self._process.wait(timeout=1)}"
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
