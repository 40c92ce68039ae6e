"""Rewards in worker processes with hard deadlines: a call that hangs is killed, a worker that dies is replaced.

Only `kill -9` is a timeout: a verifier that holds the interpreter lock stops neither for threads nor for signals.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlbench_rewards.contract import ERROR, TIMEOUT, RewardOutcome, RewardSample
from rlbench_rewards.worker import MAX_FRAME_BYTES, encode_frame

_START_DEADLINE_S = 120.0  # importing sympy on a busy machine


class _WorkerDied(Exception):
    pass


class _DeadlinePassed(Exception):
    pass


@dataclass(slots=True)
class _Call:
    index: int  # of the sample
    name: str  # of the component
    frame: bytes
    num_tries: int = 0


class RewardPool:
    """Scores samples with every configured reward.

    Args:
        specs: one {"name", "path", "kwargs"} a reward; see `loading.load_reward`.
        num_workers: processes.
        timeout_s: deadline of one call, in seconds.
        allowed_prefixes: what paths may begin with besides "rlbench_rewards.".
        memory_limit_gib: address space of a worker.
        max_calls_per_worker: a worker is replaced after so many calls.

    Raises:
        ValueError: a reward cannot be built; found at once, in a worker.
    """

    def __init__(
        self,
        specs: Sequence[Mapping[str, Any]],
        *,
        num_workers: int,
        timeout_s: float,
        allowed_prefixes: Sequence[str] = (),
        memory_limit_gib: float = 4.0,
        max_calls_per_worker: int = 20_000,
    ) -> None:
        self._names = [spec["name"] for spec in specs]
        setup = {
            "specs": [dict(spec) for spec in specs],
            "allowed_prefixes": list(allowed_prefixes),
            "sys_path": [os.path.abspath(entry) for entry in sys.path],
            "memory_limit_bytes": int(memory_limit_gib * 2**30),
        }
        self._setup_frame = encode_frame(setup)
        self._timeout_s = timeout_s
        self._max_calls = max_calls_per_worker
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        try:
            for _ in range(num_workers):
                self._workers.append(_Worker(self._setup_frame))
            for worker in self._workers:
                worker.wait_until_built()
        except BaseException:
            self.close()
            raise

    def score(self, samples: Sequence[RewardSample]) -> list[dict[str, RewardOutcome]]:
        """Outcomes by component name for each sample, in the order of the samples. Usable from any thread."""
        with self._lock:
            calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
            outcomes: list[dict[str, RewardOutcome]] = [{} for _ in samples]
            num_left = _Countdown(len(samples) * len(self._names))
            for index, sample in enumerate(samples):
                plain = {name: getattr(sample, name) for name in RewardSample.__slots__}
                plain["columns"] = dict(sample.columns)
                for name in self._names:
                    calls.put(_Call(index, name, encode_frame({"name": name, "sample": plain})))
            threads = [
                threading.Thread(target=self._serve, args=(slot, calls, outcomes, num_left), daemon=True)
                for slot in range(len(self._workers))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return [{name: outcome[name] for name in self._names} for outcome in outcomes]

    def close(self) -> None:
        """Kill all workers and wait for their end."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(
        self, slot: int, calls: queue.SimpleQueue[_Call], outcomes: list[dict[str, RewardOutcome]], left: _Countdown
    ) -> None:
        """One thread a worker: take calls until none is left anywhere (a failed one may come back)."""
        while left.is_positive():
            try:
                call = calls.get(timeout=0.02)
            except queue.Empty:
                continue
            outcome = self._run(slot, call)
            if outcome is None:
                calls.put(call)
                continue
            outcomes[call.index][call.name] = outcome
            left.decrease()

    def _run(self, slot: int, call: _Call) -> RewardOutcome | None:
        """The call's outcome; None if the worker died under it and it should be tried once more."""
        start = time.monotonic()
        try:
            worker = self._ready_worker(slot)
            reply = worker.call(call.frame, self._timeout_s)
        except _DeadlinePassed:
            self._workers[slot].kill()
            elapsed = time.monotonic() - start
            return RewardOutcome(status=TIMEOUT, message=f"no verdict within {self._timeout_s:g} s", latency_s=elapsed)
        except (_WorkerDied, ValueError, OSError) as error:
            self._workers[slot].kill()
            call.num_tries += 1
            if call.num_tries < 2:
                return None
            message = f"the worker died twice on this sample ({error})"
            return RewardOutcome(status=ERROR, message=message, latency_s=time.monotonic() - start)
        return RewardOutcome(
            status=reply["status"],
            value=reply.get("value"),
            message=reply.get("message", ""),
            details=reply.get("details", {}),
            latency_s=time.monotonic() - start,
        )

    def _ready_worker(self, slot: int) -> _Worker:
        worker = self._workers[slot]
        if worker.is_alive() and worker.num_calls < self._max_calls:
            return worker
        worker.kill()
        self._workers[slot] = _Worker(self._setup_frame)
        self._workers[slot].wait_until_built()
        return self._workers[slot]


@dataclass(slots=True)
class _Countdown:
    _value: int
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def decrease(self) -> None:
        with self._lock:
            self._value -= 1

    def is_positive(self) -> bool:
        with self._lock:
            return self._value > 0


class _Worker:
    """One process and its two pipes."""

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
        self._write(setup_frame, time.monotonic() + _START_DEADLINE_S)

    def wait_until_built(self) -> None:
        """Raises: ValueError if a reward cannot be built; RuntimeError if the worker does not start."""
        try:
            answer = self._read(time.monotonic() + _START_DEADLINE_S)
        except (_WorkerDied, _DeadlinePassed) as error:
            raise RuntimeError(f"a reward worker did not start ({error})") from error
        if answer["status"] == ERROR:
            raise ValueError(answer["message"])

    def call(self, frame: bytes, timeout_s: float) -> dict[str, Any]:
        self.num_calls += 1
        deadline = time.monotonic() + timeout_s
        self._write(frame, deadline)
        return self._read(deadline)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """kill -9 of the worker and everything it started in its session."""
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
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
                raise _DeadlinePassed
            try:
                view = view[os.write(descriptor, view) :]
            except BrokenPipeError as error:
                raise _WorkerDied(self._exit_text()) from error

    def _read(self, deadline: float) -> dict[str, Any]:
        (size,) = struct.unpack(">I", self._read_exactly(4, deadline))
        if size > MAX_FRAME_BYTES:
            raise _WorkerDied(f"an answer of {size} bytes")
        return json.loads(self._read_exactly(size, deadline))

    def _read_exactly(self, size: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        data = bytearray()
        while len(data) < size:
            readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise _DeadlinePassed
            part = os.read(descriptor, min(size - len(data), 2**20))
            if not part:
                raise _WorkerDied(self._exit_text())
            data += part
        return bytes(data)

    def _exit_text(self) -> str:
        try:
            return f"exit status {self._process.wait(timeout=1)}"
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
