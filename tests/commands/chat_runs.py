"""What the tests of `chat` share: short runs of the tiny model, scripted dialogues, and what was answered."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rlbench.tracking.rollout_store import read_rollouts, rollouts_path
from tests.loops.conftest import run

# Standard input is a file: a process of the fork server has none of its own.
_PROGRAM = """
import sys
sys.stdin = open("said.txt", encoding="utf-8")
sys.argv[0] = "rlbench"
from rlbench.__main__ import main
main()
"""
_FACTS = re.compile(
    r"  (?P<num_tokens>\d+) tokens, (?P<finish>stop|length), mean logprob (?P<logprob>-?\d+\.\d+), "
    r"(?P<weights>base|step \d+, fingerprint \w+), seed (?P<seed>\d+)"
)


@dataclass
class Answer:
    text: str  # as it is printed, lines joined
    facts: dict[str, str]
    rewards: str


def train(folder: Path, *overrides: str) -> Path:
    done = run(*overrides, "hydra.run.dir=run", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def talk(run_folder: Path, *arguments: str, said: list[str]) -> subprocess.CompletedProcess:
    """`chat` with one line of input after the other."""
    folder = run_folder.parent
    (folder / "said.txt").write_text("".join(f"{line}\n" for line in said), encoding="utf-8")
    return run("chat", run_folder.name, *arguments, folder=folder, program=_PROGRAM)


def answers(output: str) -> list[Answer]:
    """The answers of a dialogue, in order; a label such as "base:" is part of the text."""
    found: list[Answer] = []
    text: list[str] = []
    for line in output.split("\n"):
        if match := _FACTS.fullmatch(line):
            found.append(Answer("\n".join(text), match.groupdict(), ""))
            text = []
        elif line.startswith("  rewards: "):
            found[-1].rewards = line.strip()
        elif line.startswith("> "):
            text = []
        else:
            text.append(line)
    return found


def recorded(run_folder: Path, step: int, phase: str = "train") -> list[dict]:
    return read_rollouts(rollouts_path(run_folder, step, phase))


def question_of(row: dict) -> str:
    return row["prompt_text"].removeprefix("<user>").removesuffix("\n<assistant>")
