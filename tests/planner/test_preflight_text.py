"""The pages of `preflight` as a terminal shows them."""

from io import StringIO

from rich.console import Console

from rlbench.planner.preflight_text import outputs
from tests.report.conftest import make_rollout


def test_a_narrow_terminal_shows_length_reward_and_end_beside_the_text():
    text = "".join(f"word{number} " for number in range(60))
    rollouts = [make_rollout(1, "train/7", 11, text, 0.25, is_cut=True), make_rollout(1, "train/8", 0, "four", 1.0)]
    console = Console(file=StringIO(), width=80)

    console.print(outputs("Longest outputs", rollouts))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]

    rows = [line.split() for line in lines]
    assert rows[1] == ["tokens", "reward", "end", "text"]
    assert rows[2][:4] == ["12", "0.250", "cut", "word0"] and rows[-1] == ["1", "1.00", "own", "four"]
    assert "characters ...]" in " ".join(lines) and max(map(len, lines)) <= 80
