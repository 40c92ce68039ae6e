"""The words behind a command that reads a run: options, places and settings are told apart."""

from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

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
