"""The words behind a command that reads a run: options, places and settings are told apart."""

import re
import sys
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from rlbench.__main__ import COMMANDS, main
from rlbench.commands import eval as evaluation
from rlbench.commands import preflight, reward
from rlbench.commands.command_line import CommandLine


def line() -> CommandLine:
    found = CommandLine("walk", "walk RUN [--far N]")
    found.add_argument("--far", type=int)
    return found


def test_options_stand_anywhere_and_places_before_settings():
    options, places, settings = line().split_places(["a", "x=1", "--far", "3", "~y"])
    assert (options.far, places, settings) == (3, [Path("a")], ["x=1", "~y"])
    assert line().split_places(["~/a", "b"], "two", num_places=2)[1:] == ([Path.home() / "a", Path("b")], [])
    assert line().split(["+exp=a", "--far", "3"])[1] == ["+exp=a"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "walk needs the folder of a run"),
        (["x=1"], "walk needs the folder of a run"),
        (["~x"], "walk needs the folder of a run"),
        (["a", "--fra", "3"], "walk has no option --fra"),
        (["a", "--fa", "3"], "walk has no option --fa"),
        (["a", "--far", "x"], "argument --far: invalid int value: 'x'"),
    ],
)
def test_a_mistake_is_a_sentence_with_the_usage(words, sentence):
    with pytest.raises(ValueError) as caught:
        line().split_places(words)
    assert str(caught.value) == f"{sentence}; expected: walk RUN [--far N]"
    with pytest.raises(ValueError, match="^walk needs two places; "):
        line().split_places(["a"], "two places", num_places=2)


@pytest.mark.parametrize("word", ["--fra", "--fra=3", "--fa", "--farr"])
def test_what_is_almost_an_option_is_no_setting(word):
    with pytest.raises(ValueError, match=f"^walk has no option {word.partition('=')[0]}; expected: walk RUN"):
        line().split(["+exp=a", word])


def test_options_of_hydra_are_handed_on():
    words = [name for action in get_args_parser()._actions for name in action.option_strings]

    assert "--cfg" in words
    assert preflight.split_arguments([*words, "hydra.run.dir=a"])[1] == [*words, "hydra.run.dir=a"]
    assert reward.split_arguments(["test", *words])[1] == words
    assert evaluation.parse(["+exp=a", *words]).overrides == ["+exp=a", *words]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_behind_a_command_is_of_that_command(command, word, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rlbench", command, "RUN", word])
    try:
        main()
    except SystemExit as end:  # argparse's own
        assert end.code == 0
    shown = capsys.readouterr().out

    (usage,) = [line for line in shown.splitlines() if line.startswith("usage: ")]
    options = set(re.findall(r"\[(--[a-z-]+)", usage)) - {"--"}
    assert usage.startswith(f"usage: python -m rlbench {command} ")
    assert all(re.search(rf"^  {option}\b.*", shown, re.MULTILINE) for option in options)


def test_help_behind_two_dashes_belongs_to_the_other_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rlbench", "serve", "NOT_A_RUN", "--", "--help"])
    with pytest.raises(SystemExit) as end:
        main()

    assert end.value.code == 2 and "NOT_A_RUN" in capsys.readouterr().err
