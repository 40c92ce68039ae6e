"""The live lines at the bottom of a terminal.

Not rich.live: that swaps sys.stdout and sys.stderr for proxies with a lock, which a forked reward worker could
inherit locked, and its cursor stays behind the live text, so that other libraries' log lines are glued to it. These
lines leave the cursor at their own beginning; whatever is printed next overwrites them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

TICK_S = 1.0
MIN_REDRAW_S = 0.1


class StatusLine:
    """Draws `render()` on the last lines, again every second from a daemon thread, until hidden.

    Args:
        console: where to draw.
        render: gives the lines, cut to the terminal's width; called from the thread too.
        now: monotonic seconds.
    """

    def __init__(self, console: Console, render: Callable[[], Sequence[Text]], now: Callable[[], float]) -> None:
        self._console, self._render, self._now = console, render, now
        self._lock = threading.RLock()
        self._is_shown = False
        self._num_drawn = 0  # lines on the screen, the cursor at the beginning of the first
        self._drawn_at = float("-inf")
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def show(self) -> None:
        """Draw, unless that was done a moment ago."""
        with self._lock:
            was_shown, self._is_shown = self._is_shown, True
            if not was_shown or self._now() - self._drawn_at >= MIN_REDRAW_S:
                self._draw()
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._tick, name="status-line", daemon=True)
                self._thread.start()

    def hide(self) -> None:
        """Take the lines away."""
        with self._lock:
            if self._is_shown:
                self._erase()
            self._is_shown = False

    def close(self) -> None:
        """Take the lines away for good and end the thread."""
        self.hide()
        self._closed.set()

    @contextmanager
    def above(self) -> Iterator[None]:
        """Print inside: the lines make room and come back below."""
        with self._lock:
            if self._is_shown:
                self._erase()
            yield
            if self._is_shown:
                self._draw()

    def _tick(self) -> None:
        while not self._closed.wait(TICK_S):
            with self._lock:
                if self._is_shown and not self._closed.is_set():
                    self._draw()

    def _draw(self) -> None:
        self._drawn_at = self._now()
        lines = list(self._render())[-max(1, self._console.height - 1) :]
        for line in lines:
            line.truncate(max(1, self._console.width - 1), overflow="ellipsis")
        self._erase()
        self._console.print(Text("\n").join(lines), end="\r", soft_wrap=True)
        self._num_drawn = len(lines)
        self._move_up()

    def _erase(self) -> None:
        below = [(ControlType.CURSOR_DOWN, 1), (ControlType.ERASE_IN_LINE, 2)] * (self._num_drawn - 1)
        self._console.control(Control((ControlType.ERASE_IN_LINE, 2), *below, ControlType.CARRIAGE_RETURN))
        self._move_up()
        self._num_drawn = 0

    def _move_up(self) -> None:
        if self._num_drawn > 1:
            self._console.control(Control((ControlType.CURSOR_UP, self._num_drawn - 1)))
