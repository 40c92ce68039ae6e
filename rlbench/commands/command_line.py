"""The words behind a command: its options anywhere, then the places that it reads, then settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

_LIKENESS = 0.75  # of a slip; Hydra's options are further from ours
_SETTINGS = "Any setting may follow as key=value; python -m rlbench explain KEY shows what one means."


class CommandLine(argparse.ArgumentParser):
    """Options of one command, which `format_help` shows; every mistake is a sentence that ends with the usage."""

    def __init__(self, command: str, usage: str, *, settings: str = _SETTINGS) -> None:
        """
        Args:
            command: its name.
            usage: the whole call.
            settings: what may stand behind the options, in words.
        """
        super().__init__(usage=usage, epilog=settings, add_help=False, exit_on_error=False, allow_abbrev=False)
        self._command, self._usage = command, usage

    def split(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options, and the words that are none of them.

        Raises:
            ValueError: an option has no proper value, or is written almost as one.
        """
        try:
            options, rest = self.parse_known_args(list(arguments))
        except argparse.ArgumentError as error:
            raise self.mistake(str(error)) from error
        own = [name for action in self._actions for name in action.option_strings]
        for word in rest:
            name = word.partition("=")[0]
            if word.startswith("--") and (
                get_close_matches(name, own, cutoff=_LIKENESS) or any(o.startswith(name) for o in own)
            ):
                raise self._unknown(name)  # what resembles none of them may be an option of Hydra's
        return options, rest

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
            raise self._unknown(unknown[0])
        places, settings = rest[:num_places], rest[num_places:]
        if len(places) < num_places or any(_is_setting(place) for place in places):
            raise self.mistake(f"{self._command} needs {needs}")
        return options, [Path(place).expanduser() for place in places], settings

    def _unknown(self, name: str) -> ValueError:
        return self.mistake(f"{self._command} has no option {name}")

    def mistake(self, what: str) -> ValueError:
        """To raise."""
        return ValueError(f"{what}; expected: {self._usage}")


def section_of(setting: str) -> str:
    """Of the config that `a.b=c`, `+a.b=c`, `~a.b` or `a=choice` changes: a."""
    return setting.lstrip("+~").partition("=")[0].partition(".")[0]


def _is_setting(word: str) -> bool:
    """key=value, or ~key, which removes an entry; ~/ begins a path."""
    return "=" in word or (word.startswith("~") and not word.startswith("~/"))
