"""SIGINT and SIGTERM end a run after the current step; a step that takes too long is given up, from another thread."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
        self._heard: tuple[int, float] | None = None  # signal and monotonic second
        self._announce = announce
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1
        self._due: StepAbandoned | None = None
        self._ends: tuple[socket.socket, socket.socket] | None = None  # signals are written to the second

    @property
    def exit_status(self) -> int:
        """128 + signal number, as shells do."""
        return 128 + (self.signal_number or (self._heard[0] if self._heard else 0))

    def is_overdue(self) -> bool:
        """Whether a signal came longer than `grace_s` ago, and nothing is being saved. For one thread beside the main.

        It hears of signals even while the main thread, where Python handles them, hangs.
        """
        with suppress(OSError):  # nothing to read, or left already
            for number in self._ends[0].recv(64) if self._ends and self._heard is None else b"":
                if number in self._previous:
                    self._heard = (number, time.monotonic())
                    break
        is_late = self._heard is not None and time.monotonic() - self._heard[1] > self.grace_s
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
                return self
        self._ends = socket.socketpair()
        for end in self._ends:
            end.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if self._ends is not None:
            signal.set_wakeup_fd(self._previous_fd)
            for end in self._ends:
                end.close()

    def _raise_due(self) -> None:
        if self._due is not None and not self.is_shielded:
            due, self._due = self._due, None
            raise due

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._due is not None:
            return self._raise_due()
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number
        name = signal.Signals(number).name
        self._announce(
            f"{name}: finishing this step, then saving; after {self.grace_s:g} s (training.stop_grace_s) the step is "
            "given up; press again to end at once without saving"
        )
