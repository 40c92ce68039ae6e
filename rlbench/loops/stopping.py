"""SIGINT and SIGTERM end a run after the current step; a step that takes too long is given up, from another thread."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StepAbandoned(BaseException):
    """The step is given up. Raised in the main thread between any two of its instructions, so no `Exception`."""

    def __init__(self, reason: str, exit_status: int) -> None:
        super().__init__(reason)
        self.exit_status = exit_status


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is remembered in `signal_number` and announced once.

    Outside the main thread no handler can be set; then signals do what they did before.

    Args:
        announce: says a line to the user.
        grace_s: training.stop_grace_s.
    """

    def __init__(self, announce: Callable[[str], None], grace_s: float) -> None:
        self.signal_number: int | None = None
        self.grace_s = grace_s
        self.is_shielded = False
        self._asked_at = 0.0
        self._announce = announce
        self._previous: dict[int, Any] = {}
        self._due: StepAbandoned | None = None

    @property
    def exit_status(self) -> int:
        """128 + signal number, as shells do."""
        return 128 + (self.signal_number or 0)

    @property
    def is_overdue(self) -> bool:
        """A signal came longer than `grace_s` ago, and nothing is being saved."""
        is_late = self.signal_number is not None and time.monotonic() - self._asked_at > self.grace_s
        return is_late and not self.is_shielded

    @property
    def is_unheard(self) -> bool:
        """The main thread has not come to the step's end that `abandon` asked for: it hangs outside of Python."""
        return self._due is not None and not self.is_shielded

    def abandon(self, due: StepAbandoned) -> None:
        """Raise `due` in the main thread: at once, or when what is being saved is saved. From any thread."""
        self._due = due
        if self._previous:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Inside, nothing is given up."""
        self.is_shielded = True
        try:
            yield
        finally:
            self.is_shielded = False
        self._raise_due()

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _raise_due(self) -> None:
        if self._due is not None and not self.is_shielded:
            due, self._due = self._due, None
            raise due

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._due is not None:
            return self._raise_due()
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self._asked_at = time.monotonic()
        self.signal_number = number
        name = signal.Signals(number).name
        self._announce(
            f"{name}: finishing this step, then saving; after {self.grace_s:g} s (training.stop_grace_s) the step is "
            "given up; press again to end at once without saving"
        )
