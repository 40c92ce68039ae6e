"""Checks that name the key, the value and what is expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any


class RefusedSetting(ValueError):
    """Refuses a new run for one setting; a run that was recorded with it is read as if it had another value.

    Raise it only where nothing reads the value, or training alone does: the policy that was trained is there.

    Example:
        RefusedSetting("optim.momentum is 0.9, but ...; expected null", "optim.momentum", None)
    """

    def __init__(self, message: str, key: str, instead: Any, *, is_read: bool = False) -> None:
        """
        Args:
            message: the sentence for the user of a new run.
            key: dotted, of the setting.
            instead: the value that a recorded run is read with.
            is_read: training depends on it, so that a run that goes on with another one changes.
        """
        super().__init__(message)
        self.key, self.instead, self.is_read = key, instead, is_read


def nearest(word: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The choices most like `word`, best first; whole dotted keys also match by their last part."""
    choices = list(choices)
    last = word.rsplit(".", 1)[-1]
    by_whole = difflib.get_close_matches(word, choices, n=count, cutoff=0.6)
    by_last = [c for m in difflib.get_close_matches(last, [c.rsplit(".", 1)[-1] for c in choices], n=count, cutoff=0.6)
               for c in choices if c.rsplit(".", 1)[-1] == m]  # fmt: skip
    return list(dict.fromkeys([*by_whole, *by_last]))[:count]


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        guess = nearest(str(value), choices, count=1)
        hint = f"; did you mean {guess[0]}?" if guess else ""
        raise ValueError(f"{key} is {value!r}, expected one of: {', '.join(choices)}{hint}")


def check_range(
    key: str, value: float | None, *, low: float | None = None, high: float | None = None,
    is_low_open: bool = False, is_high_open: bool = False,
) -> None:  # fmt: skip
    """None passes: it stands for a derived value."""
    if value is None:
        return
    if low is not None and (value < low or (is_low_open and value == low)):
        raise ValueError(f"{key} is {value}, expected {'more than' if is_low_open else 'at least'} {low}")
    if high is not None and (value > high or (is_high_open and value == high)):
        raise ValueError(f"{key} is {value}, expected {'less than' if is_high_open else 'at most'} {high}")
    if value != value:
        raise ValueError(f"{key} is {value}, expected a number")


def check_pattern(key: str, pattern: str | None) -> None:
    """None passes."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"{key} is {pattern!r}, expected a regular expression: {error}") from error
