"""Rewards in worker processes with hard deadlines: a call that hangs is killed, a worker that dies is replaced.

Only `kill -9` is a timeout: a verifier that holds the interpreter lock stops neither for threads nor for signals.

One thread a worker takes calls from a bounded queue, so whoever submits more than the workers can do waits. A call is
finished by the thread that took it: tried again after a death of the worker (once) and after an error or a timeout
(`max_retries` times); a batch that fails is split, so that one bad sample costs only itself.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from rlbench_rewards.contract import ERROR, TIMEOUT, RewardOutcome, RewardSample
from rlbench_rewards.pool_stats import QUARANTINED, RESTARTS, RETRIES, PoolStats
from rlbench_rewards.submission import Call, Scores, Submission
from rlbench_rewards.worker import encode_frame
from rlbench_rewards.worker_process import DeadlinePassed, WorkerDied, WorkerProcess

_MAX_DEATHS = 2  # under one sample, before it is quarantined
_MAX_START_TRIES = 3


class RewardPool:
    """Scores samples with every configured reward.

    Args:
        specs: one {"name", "path", "kwargs"} a reward, see `loading.load_reward`; optional: "batch_size" (samples of
            one call, 1), "timeout_s" (its own deadline), "as_messages".
        num_workers: processes.
        timeout_s: deadline of one call, in seconds.
        allowed_prefixes: what paths may begin with besides "rlbench_rewards.".
        columns: names of the data's columns, to find a reward that needs another one; None: not checked.
        max_retries: how often a call that ended in an error or a timeout is tried again.
        max_pending: calls that wait for a worker; `submit` and `Submission.close` block above it.
        memory_limit_gib: address space of a worker.
        max_calls_per_worker: a worker is replaced after so many calls.

    Attributes:
        stats: what happened to the calls.
        notes: what rewards say about themselves, by component: the text in their attribute `note`, if they have one.

    Raises:
        ValueError: a reward cannot be built; found at once, in a worker.
        RuntimeError: a worker does not start.
    """

    def __init__(
        self,
        specs: Sequence[Mapping[str, Any]],
        *,
        num_workers: int,
        timeout_s: float,
        allowed_prefixes: Sequence[str] = (),
        columns: Sequence[str] | None = None,
        max_retries: int = 0,
        max_pending: int = 1024,
        memory_limit_gib: float = 4.0,
        max_calls_per_worker: int = 20_000,
    ) -> None:
        self._specs = {spec["name"]: dict(spec) for spec in specs}
        setup = {
            "specs": list(self._specs.values()),
            "allowed_prefixes": list(allowed_prefixes),
            "columns": None if columns is None else list(columns),
            "sys_path": [os.path.abspath(entry) for entry in sys.path],
            "memory_limit_bytes": int(memory_limit_gib * 2**30),
        }
        self._setup_frame = encode_frame(setup)
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._max_calls = max_calls_per_worker
        self._calls: queue.Queue[Call | None] = queue.Queue(max_pending)
        self._quarantine: set[bytes] = set()
        self._is_closed = False
        self._workers: list[WorkerProcess | None] = [None] * num_workers
        self.stats = PoolStats()
        self.notes: dict[str, str] = {}
        started: list[Future[None]] = [Future() for _ in range(num_workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(slot, started[slot]), daemon=True) for slot in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()
        try:
            for future in started:
                future.result()
        except BaseException:
            self.close()
            raise

    def score(self, samples: Sequence[RewardSample]) -> Scores:
        """Outcomes by component name for each sample, in the order of the samples. Usable from any thread.

        Raises:
            RuntimeError: workers do not start any more.
        """
        return self.submit(samples).result()

    def submit(self, samples: Sequence[RewardSample]) -> Future[Scores]:
        """The same as a future, so that scoring runs beside other work. Blocks while the queue is full."""
        submission = self.open(len(samples))
        for index, sample in enumerate(samples):
            submission.put(index, sample)
        return submission.close()

    def open(self, num_samples: int) -> Submission:
        """For samples that come one by one; equal samples give equal calls, whenever they come.

        Raises:
            RuntimeError: the pool is closed.
        """
        if self._is_closed:
            raise RuntimeError("the reward pool is closed")
        batch_sizes = {name: spec.get("batch_size", 1) for name, spec in self._specs.items()}
        return Submission(num_samples, batch_sizes, self._calls, lambda: self._is_closed)

    def close(self) -> None:
        """Kill all workers and wait for their end."""
        self._is_closed = True
        for worker in self._workers:
            if worker is not None:
                worker.end()
        while True:  # what still waits gets no answer any more
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                break
            if call is not None:
                call.ticket.fail(RuntimeError("the reward pool was closed"))
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(timeout=10)
        for worker in self._workers:
            if worker is not None:
                worker.kill()
        self._workers = [None] * len(self._workers)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.pid for worker in self._workers if worker is not None]

    # --- in the thread of a worker

    def _serve(self, slot: int, started: Future[None]) -> None:
        try:
            self._start(slot)
            started.set_result(None)
        except (ValueError, RuntimeError) as error:
            started.set_exception(error)
            return
        while (call := self._calls.get()) is not None:
            try:
                self._finish(slot, call)
            except RuntimeError as error:
                call.ticket.fail(error)

    def _finish(self, slot: int, call: Call) -> None:
        """Deliver an outcome for every sample of the call."""
        start = time.monotonic()
        outcomes = self._outcomes(slot, call)
        for index, outcome in zip(call.indices, outcomes, strict=True):
            self.stats.add_outcome(outcome.status, (time.monotonic() - start) / len(outcomes))
            call.ticket.put(index, call.name, outcome)

    def _outcomes(self, slot: int, call: Call) -> list[RewardOutcome]:
        is_single = len(call.samples) == 1
        if is_single and self._quarantine and call.key() in self._quarantine:
            return [RewardOutcome(status=ERROR, message="quarantined: workers died under this sample before")]
        num_tries = num_deaths = 0
        while True:
            num_tries += 1
            outcomes, has_died = self._try(slot, call, num_tries)
            if all(outcome.status not in (ERROR, TIMEOUT) for outcome in outcomes):
                return outcomes
            if not is_single:
                self.stats.count(RETRIES)
                return [outcome for part in call.split() for outcome in self._outcomes(slot, part)]
            num_deaths += has_died
            if num_deaths >= _MAX_DEATHS:
                self._quarantine.add(call.key())
                self.stats.count(QUARANTINED)
                return outcomes
            if not has_died and num_tries > self._max_retries + num_deaths:
                return outcomes
            self.stats.count(RETRIES)

    def _try(self, slot: int, call: Call, num_tries: int) -> tuple[list[RewardOutcome], bool]:
        """Outcomes of one try, and whether the worker died under it."""
        timeout_s = self._specs[call.name].get("timeout_s") or self._timeout_s
        worker = self._ready_worker(slot)
        start = time.monotonic()
        try:
            reply = worker.call(encode_frame({"name": call.name, "samples": call.samples}), timeout_s)
            outputs = reply["outputs"]
        except DeadlinePassed:
            worker.kill()
            message = f"no verdict within {timeout_s:g} s"
            return self._failed(call, TIMEOUT, message, time.monotonic() - start, num_tries), False
        except (WorkerDied, ValueError, KeyError, OSError) as error:
            worker.kill()
            message = f"the worker died {'twice' if num_tries > 1 else ''} on this sample ({error})".replace("  ", " ")
            return self._failed(call, ERROR, message, time.monotonic() - start, num_tries), True
        latency = (time.monotonic() - start) / len(outputs)
        return [RewardOutcome(**output, latency_s=latency, num_tries=num_tries) for output in outputs], False

    @staticmethod
    def _failed(call: Call, status: str, message: str, latency_s: float, num_tries: int) -> list[RewardOutcome]:
        failed = RewardOutcome(status=status, message=message, latency_s=latency_s, num_tries=num_tries)
        return [failed] * len(call.samples)

    def _ready_worker(self, slot: int) -> WorkerProcess:
        worker = self._workers[slot]
        if worker is not None and worker.is_alive() and worker.num_calls < self._max_calls:
            return worker
        if worker is not None:
            worker.kill()
        for attempt in range(_MAX_START_TRIES):
            try:
                return self._start(slot)
            except (ValueError, RuntimeError) as error:
                if self._is_closed or attempt == _MAX_START_TRIES - 1:
                    raise RuntimeError(f"a reward worker cannot be replaced: {error}") from error
        raise AssertionError("unreachable")

    def _start(self, slot: int) -> WorkerProcess:
        if self._is_closed:
            raise RuntimeError("the reward pool was closed")
        is_restart = self._workers[slot] is not None
        worker = self._workers[slot] = WorkerProcess(self._setup_frame)
        self.notes = worker.wait_until_built()
        if is_restart:
            self.stats.count(RESTARTS)
        return worker
