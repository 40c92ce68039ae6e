"""Text from models, data and the system, made harmless to print."""

from __future__ import annotations

import os
import unicodedata
from typing import Any

# Cc control (ESC, NUL, CR), Cs lone surrogate, Cf format (bidi overrides, zero width), Zl/Zp line separators.
_ESCAPED_CATEGORIES = {"Cc", "Cs", "Cf", "Zl", "Zp"}
_JOINERS = {"\u200c", "\u200d"}  # parts of emoji and of several scripts


def printable(text: str, *, keep_newlines: bool = False) -> str:
    """The text with everything that could move the cursor, change colours or reorder lines shown as an escape.

    A tab becomes four spaces, a newline `\\n` unless kept, ESC becomes `\\x1b`, NUL `\\x00`, a lone surrogate
    `\\ud800`, a bidi override `\\u202e`. Ordinary text of any script is unchanged.
    """
    return "".join(_shown(character, keep_newlines) for character in text)


def _shown(character: str, keep_newlines: bool) -> str:
    if character == "\n":
        return "\n" if keep_newlines else "\\n"
    if character == "\t":
        return "    "
    if unicodedata.category(character) in _ESCAPED_CATEGORIES and character not in _JOINERS:
        return character.encode("unicode_escape").decode("ascii")
    return character


def shorten(text: str, max_chars: int, *, keep: str = "ends") -> str:
    """At most about `max_chars` characters of a text, with a note of how many were left out.

    Args:
        text: any text.
        max_chars: characters that are kept.
        keep: "end", or "ends" for two thirds of the beginning and one third of the end.
    """
    num_left_out = len(text) - max_chars
    if num_left_out <= 0:
        return text
    note = f"[... {num_left_out} characters ...]"
    if keep == "end":
        return f"{note} {text[-max_chars:]}"
    head = max_chars * 2 // 3
    return f"{text[:head]} {note} {text[len(text) - (max_chars - head) :]}"


def _point_at_null_device(file: Any) -> None:
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, file.fileno())
        os.close(null)
    except (OSError, ValueError):  # the stream has no file descriptor
        pass


class SafeFile:
    """A text stream that never raises: it escapes what its encoding lacks and goes silent when its reader is gone.

    A closed terminal, `| head` or a full disk behind a redirected log must not stop a run. What a signal handler
    writes while it interrupts a write follows with the next one.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._late = ""  # written in the middle of another write
        self.is_gone = False

    def write(self, text: str) -> int:
        """Write, escaping characters that the stream's encoding cannot hold."""
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        late, self._late = self._late, ""
        try:
            if not self.is_gone:
                self._file.write((late + text).encode(encoding, "backslashreplace").decode(encoding))
        except RuntimeError:  # Python refuses a reentrant call
            self._late = late + text
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flush, if anybody still reads."""
        try:
            if not self.is_gone:
                if self._late:
                    self.write("")
                self._file.flush()
        except RuntimeError:  # reentrant: the interrupted call flushes
            return
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.is_gone = True
        if isinstance(error, BrokenPipeError):  # else Python's own flush at exit fails and sets exit code 120
            _point_at_null_device(self._file)

    def isatty(self) -> bool:
        """Whether a person sees the stream."""
        try:
            return bool(self._file.isatty())
        except (AttributeError, OSError, ValueError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
