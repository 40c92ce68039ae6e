"""The words behind a command that reads a run: its options anywhere, then the run's folder, then settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


class CommandLine(argparse.ArgumentParser):
    """Options of one command; every mistake is a sentence that ends with the usage."""

    def __init__(self, command: str, usage: str) -> None:
        super().__init__(add_help=False, exit_on_error=False, allow_abbrev=False)
        self._command, self._usage = command, usage

    def split(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options, and the words that are none of them.

        Raises:
            ValueError: an option has no proper value.
        """
        try:
            return self.parse_known_args(list(arguments))
        except argparse.ArgumentError as error:
            raise self.mistake(str(error)) from error

    def split_places(
        self, arguments: Sequence[str], needs: str = "the folder of a run", num_places: int = 1
    ) -> tuple[argparse.Namespace, list[Path], list[str]]:
        """The options, the places that are named first, and the settings behind them.

        Args:
            arguments: of the command.
            needs: the places, in words.
            num_places: that must be there.

        Raises:
            ValueError: a place is missing, or an option is unknown or has no proper value.
        """
        options, rest = self.split(arguments)
        unknown = [word for word in rest if word.startswith("-")]
        if unknown:
            raise self.mistake(f"{self._command} has no option {unknown[0]}")
        places, settings = rest[:num_places], rest[num_places:]
        if len(places) < num_places or any(_is_setting(place) for place in places):
            raise self.mistake(f"{self._command} needs {needs}")
        return options, [Path(place).expanduser() for place in places], settings

    def mistake(self, what: str) -> ValueError:
        """To raise."""
        return ValueError(f"{what}; expected: {self._usage}")


def _is_setting(word: str) -> bool:
    """key=value, or ~key, which removes an entry; ~/ begins a path."""
    return "=" in word or (word.startswith("~") and not word.startswith("~/"))
