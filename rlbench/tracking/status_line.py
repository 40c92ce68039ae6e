"""The live line at the bottom of a terminal.

Not rich.live: that swaps sys.stdout and sys.stderr for proxies with a lock, which a forked reward worker could
inherit locked, and its cursor stays behind the live text, so that other libraries' log lines are glued to it. This
line leaves the cursor at its own beginning; whatever is printed next overwrites it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

TICK_S = 1.0
MIN_REDRAW_S = 0.1


class StatusLine:
    """Draws `render()` on the last line, again every second from a daemon thread, until hidden.

    Args:
        console: where to draw.
        render: gives the line; called from the thread too.
        now: monotonic seconds.
    """

    def __init__(self, console: Console, render: Callable[[], Text], now: Callable[[], float]) -> None:
        self._console, self._render, self._now = console, render, now
        self._lock = threading.RLock()
        self._is_shown = False
        self._drawn_at = float("-inf")
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def show(self) -> None:
        """Draw the line, unless it was drawn a moment ago."""
        with self._lock:
            self._is_shown = True
            if self._now() - self._drawn_at >= MIN_REDRAW_S:
                self._draw()
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._tick, name="status-line", daemon=True)
                self._thread.start()

    def hide(self) -> None:
        """Take the line away."""
        with self._lock:
            if self._is_shown:
                self._erase()
            self._is_shown = False

    def close(self) -> None:
        """Take the line away for good and end the thread."""
        self.hide()
        self._closed.set()

    @contextmanager
    def above(self) -> Iterator[None]:
        """Print inside: the line makes room and comes back below."""
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
        text = self._render()
        text.truncate(max(1, self._console.width - 1), overflow="ellipsis")
        self._erase()
        self._console.print(text, end="\r", soft_wrap=True)

    def _erase(self) -> None:
        self._console.control(Control((ControlType.ERASE_IN_LINE, 2), ControlType.CARRIAGE_RETURN))
