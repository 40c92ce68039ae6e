"""Ends a run that hangs, or that takes too long to stop: a thread beside the one that works.

The work is asked to end first, by an exception in the main thread, so that what is left intact can be saved. Where that
thread does not hear it, inside of a library that never returns, the process is ended; checkpoints are complete or
absent, so the last one is where the run goes on. A library that hangs without giving the interpreter's lock back stops
this thread too and is not noticed.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlbench import progress
from rlbench.config.watchdog import WatchdogConfig
from rlbench.loops.stopping import StepAbandoned, StopRequest

STALLED = 9  # exit status
_UNHEARD_S = 5.0  # after the end of training.stop_grace_s, for a step that does not hear that it is given up


class Watchdog:
    """While entered, looks every second whether `progress.mark` was called or a phase began or ended.

    Args:
        config: the `watchdog` part of the config.
        stop: of the run.
        run_folder: stacks are written there; its checkpoints are named to the user.
    """

    def __init__(self, config: WatchdogConfig, stop: StopRequest, run_folder: Path) -> None:
        self.stop = stop
        self._config = config
        self._run_folder = run_folder
        self._phases: list[str] = []
        self._num_changes = 0
        self._is_left = threading.Event()
        self._is_closed = threading.Event()
        limits = [limit for limit in (config.limit_s, *config.phase_limits_s.values()) if limit]
        self._poll_s = min([1.0, stop.grace_s / 4, *(limit / 4 for limit in limits)])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the run with a name; may nest."""
        self._phases.append(name)
        self._num_changes += 1
        try:
            yield
        finally:
            self._phases.pop()
            self._num_changes += 1

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_left.set()

    def close(self) -> None:
        """The run has ended in good order: it is not ended from outside any more."""
        self._is_closed.set()

    # --- in the watchdog's thread

    def _watch(self) -> None:
        seen, idle_s, before = (-1, -1), 0.0, time.monotonic()
        while not self._is_left.wait(self._poll_s):
            now = time.monotonic()
            passed_s = min(now - before, 2 * self._poll_s)  # no more: the whole process may have been suspended
            before = now
            current = (progress.num_marks(), self._num_changes)
            idle_s = idle_s + passed_s if current == seen else 0.0
            seen = current
            phase = self._phases[-1] if self._phases else None
            limit_s = self._config.limit_of(phase)
            if limit_s and idle_s > limit_s:
                return self._end_stalled(phase, limit_s)
            if self.stop.is_overdue():
                return self._end_overdue(phase)

    def _end_stalled(self, phase: str | None, limit_s: float) -> None:
        shown = phase or "between two phases"
        key = (phase or "").replace(" ", "_")
        setting = f"watchdog.phase_limits_s.{key}" if key in self._config.phase_limits_s else "watchdog.limit_s"
        reason = f"{shown}: no progress for {limit_s:g} s ({setting}); {self._dump_stacks(key or 'between_phases')}"
        self.stop.abandon(StepAbandoned(reason, STALLED))
        if not self._is_closed.wait(self._config.grace_s):
            self._end(f"{reason}; it did not end within {self._config.grace_s:g} s (watchdog.grace_s)", STALLED)

    def _end_overdue(self, phase: str | None) -> None:
        grace_s, status = self.stop.grace_s, self.stop.exit_status
        reason = f"{phase or 'the step'} was given up after {grace_s:g} s (training.stop_grace_s)"
        self.stop.abandon(StepAbandoned(reason, status))
        deadline = time.monotonic() + _UNHEARD_S
        while not self._is_closed.wait(self._poll_s):
            if not self.stop.is_unheard:
                deadline = time.monotonic() + _UNHEARD_S  # it is saving
            elif time.monotonic() > deadline:
                self._end(f"{reason}, and did not end by itself", status)

    def _dump_stacks(self, name: str) -> str:
        """All Python stacks of this process, in a file; says where."""
        path = self._run_folder / f"stacks_{name}.txt"
        try:
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            return f"the stacks of its threads cannot be written to {path} ({error.strerror})"
        return f"the stacks of all threads are in {path}"

    def _end(self, reason: str, status: int) -> None:
        # Another thread ends the process if the line cannot be written, as on a terminal that is stopped.
        killer = threading.Timer(1.0, os._exit, [status])
        killer.daemon = True
        killer.start()
        has_checkpoint = any((self._run_folder / "checkpoints").glob("step-*"))
        go_on = f"to go on: resume={self._run_folder}" if has_checkpoint else "no checkpoint was written yet"
        print(f"error: {reason}; {go_on}", file=sys.stderr, flush=True)
        os._exit(status)
