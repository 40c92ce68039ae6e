"""`rlbench reward test` from the command line: exit status, what is printed, what is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlbench.commands.reward import TrialOptions, split_arguments

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "rewards"))),
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "160",
}


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rlbench", "reward", *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)


def write_rows(folder: Path, rows: list[dict]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={path}"


def test_math_rows_with_good_golds_pass(tmp_path):
    answers = [
        r"\frac{1}{2}",
        "(3, \\frac{\\pi}{2})",
        "x^2+1",
        r"\{1,2\}",
        "14",
        r"[0, 1)",
        r"\begin{pmatrix}1&2\end{pmatrix}",
    ]
    rows = [{"problem": f"p{i}", "answer": answer} for i, answer in enumerate(answers)]
    done = run("test", "+exp=grpo_math", write_rows(tmp_path, rows), "--json", "out/trial.json", folder=tmp_path)
    written = json.loads((tmp_path / "out/trial.json").read_text())

    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 7 score 1" in done.stdout and "all rewards pass" in done.stdout
    assert written["verdict"] == "pass" and written["rewards"]["accuracy"]["agreement"] == 1.0
    assert not (tmp_path / "outputs").exists()


def test_a_gold_that_cannot_be_right_fails_and_is_listed(tmp_path):
    rows = [{"question": "a", "answer": "#### 5"}, {"question": "b", "answer": "#### "}]
    done = run("test", "+exp=grpo_gsm8k", write_rows(tmp_path, rows), folder=tmp_path)

    assert done.returncode == 1, done.stdout + done.stderr
    assert "train/2" in done.stdout and "holds no answer" in done.stdout and "failed: accuracy" in done.stdout


def test_mistakes_are_one_sentence(tmp_path):
    done = run("test", "+exp=grpo_gsm8k", "+rewards.components.accuracy.kwargs.extrct=[hash]", folder=tmp_path)
    assert done.returncode == 2 and "extrct" in done.stderr and "Traceback" not in done.stderr
    done = run("tset", folder=tmp_path)
    assert done.returncode == 2 and "reward is followed by tset, expected: python -m rlbench reward test" in done.stderr


def test_options_are_taken_from_the_overrides():
    options, overrides = split_arguments(["test", "+exp=x", "--rows", "7", "a.b=c", "--json", "f.json"])

    assert options == TrialOptions(7, Path("f.json")) and overrides == ["+exp=x", "a.b=c"]
    with pytest.raises(ValueError, match="--rows is -1"):
        split_arguments(["test", "--rows=-1"])
    with pytest.raises(ValueError, match="invalid int value: 'x'"):
        split_arguments(["test", "--rows", "x"])
