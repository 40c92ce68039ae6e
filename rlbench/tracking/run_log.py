"""What a run prints, as plain text in its folder: log.txt."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from rich.console import Console, RenderableType

from rlbench.tracking.safe_text import SafeFile

NAME = "log.txt"
_WIDTH = 160


class RunLog:
    """Keeps what is printed until the folder is known, then appends it and all that follows; silent on a full disk."""

    def __init__(self) -> None:
        self._pending: list[RenderableType] | None = []
        self._console: Console | None = None

    def open(self, path: Path, title: str) -> None:
        """
        Args:
            path: appended to; a run has one for all its starts.
            title: the line above those of this start.

        Raises:
            OSError: it cannot be opened.
        """
        file = SafeFile(path.open("a", encoding="utf-8", buffering=1))
        self._console = Console(file=file, width=_WIDTH, force_terminal=False, color_system=None, highlight=False)  # type: ignore[arg-type]
        pending, self._pending = self._pending or [], None
        for renderable in [title, *pending]:
            self.print(renderable)

    def print(self, renderable: RenderableType) -> None:
        """One thing that the run printed."""
        if self._console is not None:
            self._console.print(renderable, soft_wrap=True, markup=False)
        elif self._pending is not None:
            self._pending.append(renderable)

    def close(self) -> None:
        """Nothing is appended any more."""
        if self._console is not None:
            with suppress(OSError):  # a full disk
                self._console.file.close()
        self._console = self._pending = None
