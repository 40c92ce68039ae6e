"""SIGINT and SIGTERM end a run after the current step; a second one ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is remembered in `signal_number` and announced once.

    Outside the main thread no handler can be set; then signals do what they did before.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.signal_number: int | None = None
        self._announce = announce
        self._previous: dict[int, Any] = {}

    @property
    def exit_status(self) -> int:
        """128 + signal number, as shells do."""
        return 128 + (self.signal_number or 0)

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

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number
        name = signal.Signals(number).name
        self._announce(f"{name}: finishing this step, then saving; press again to end at once without saving")
