"""`rlbench reward test` from the command line: exit status, what is printed, what is written."""

import json
import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rlbench.commands import preflight
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


TOOLS = [{"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}]
CALLS = [[{"name": "add", "arguments": {"a": number}}] for number in range(4)]
KINDS = {
    "tool_calls": [
        {"question": f"q{i}", "tools": json.dumps(TOOLS), "answer": json.dumps(c)} for i, c in enumerate(CALLS)
    ],
    "multiple_choice": [{"question": f"q{i}", "answer": letter} for i, letter in enumerate("ABDC")],
    "text_match": [{"question": f"q{i}", "answer": city} for i, city in enumerate(["Rome", "Bern", "Oslo"])],
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_answers_are_tried_with_what_they_cost(kind, tmp_path):
    rows = write_rows(tmp_path, KINDS[kind])
    done = run("test", f"rewards={kind}", "+rewards/add=repetition", rows, "--json", "t.json", folder=tmp_path)
    written = json.loads((tmp_path / "t.json").read_text())

    assert done.returncode == 0, done.stdout + done.stderr
    accuracy, repetition = written["rewards"]["accuracy"], written["rewards"]["repetition"]
    assert [check["verdict"] for check in accuracy["checks"]] == ["pass"] * 4 and accuracy["agreement"] == 1.0
    assert 0 < accuracy["latency_p50_s"] <= accuracy["latency_p99_s"] and accuracy["peak_memory_mib"] > 5
    assert repetition["verdict"] == "pass" and repetition["agreement"] is None
    assert "p99" in done.stdout and "MiB a worker" in done.stdout


def test_a_task_is_one_setting(tmp_path):
    exp = ["+exp=grpo_reasoning_gym", "data.name=reasoning_gym/spell_backward"]
    done = run("test", *exp, "--rows", "10", folder=tmp_path)
    assert done.returncode == 0 and "spell_backward (train)" in done.stdout, done.stdout + done.stderr

    done = run("test", *exp[:1], "data.name=reasoning_gym/puzzle24", folder=tmp_path)
    assert done.returncode == 2 and "may run the answer as code; expected another task" in done.stderr


def test_a_gold_that_cannot_be_right_fails_and_is_listed(tmp_path):
    rows = [{"question": "a", "answer": "#### 5"}, {"question": "b", "answer": "#### "}]
    done = run("test", "+exp=grpo_gsm8k", write_rows(tmp_path, rows), folder=tmp_path)

    assert done.returncode == 1, done.stdout + done.stderr
    assert "train/2" in done.stdout and "holds no answer" in done.stdout and "failed: accuracy" in done.stdout


def test_mistakes_are_one_sentence(tmp_path):
    done = run("test", "+exp=grpo_gsm8k", "+rewards.components.accuracy.kwargs.extrct=[hash]", folder=tmp_path)
    assert done.returncode == 2 and "extrct" in done.stderr and "Traceback" not in done.stderr
    done = run("test", "+exp=grpo_gsm8k", "+rewards/add=judge", folder=tmp_path)
    assert (
        done.returncode == 2 and "judge.kwargs.base_url has no value" in done.stderr and "Traceback" not in done.stderr
    )
    done = run("test", "+exp=grpo_code", folder=tmp_path)
    assert done.returncode == 2 and "data.path=FILE.jsonl with the columns text, code, test_list" in done.stderr
    done = run("tset", folder=tmp_path)
    assert done.returncode == 2 and "reward is followed by tset, expected: python -m rlbench reward test" in done.stderr


def test_options_are_taken_from_the_overrides():
    options, overrides = split_arguments(["test", "+exp=x", "--rows", "7", "a.b=c", "--json", "f.json"])

    assert options == TrialOptions(7, Path("f.json")) and overrides == ["+exp=x", "a.b=c"]
    with pytest.raises(ValueError, match="--rows is -1"):
        split_arguments(["test", "--rows=-1"])
    with pytest.raises(ValueError, match="invalid int value: 'x'"):
        split_arguments(["test", "--rows", "x"])
    with pytest.raises(ValueError, match="^reward test has no option --row; expected: python -m rlbench reward test"):
        split_arguments(["test", "--row", "3"])


def test_preflight_takes_its_options_from_the_overrides():
    options, overrides = preflight.split_arguments(["--samples", "4", "+exp=x", "--prompts=7", "hydra.run.dir=a"])

    assert options == preflight.PreflightOptions(7, 4) and overrides == ["+exp=x", "hydra.run.dir=a"]
    for words, sentence in (
        (["--prompts", "x"], "argument --prompts: invalid int value: 'x'; expected: python -m rlbench preflight"),
        (["--promts", "3"], "preflight has no option --promts; expected: python -m rlbench preflight"),
        (["--samples"], "argument --samples: expected one argument; expected: python -m rlbench preflight"),
        (["--samples=0"], "--samples is 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}"):
            preflight.split_arguments(words)


def test_the_rewards_of_the_readme_run_as_they_stand_there(tmp_path):
    section = (ROOT / "rewards" / "README.md").read_text().split("## Your own")[1].split("## ")[0]
    code = section[section.index("    from ") : section.index("    python -m rlbench")]
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(code))
    line = section.split("    python -m rlbench reward ")[1].split("\n\n")[0].replace("\\\n", " ")
    others = ["+rewards.components.exact_trl={path: my_rewards.exact_trl}"]
    others.append("+rewards.components.sample={path: my_rewards.exact}")
    rows = write_rows(tmp_path, [{"question": f"q{i}", "answer": str(i)} for i in range(4)])

    done = run(*shlex.split(line), *others, rows, "--json", "trial.json", folder=tmp_path)
    tried = json.loads((tmp_path / "trial.json").read_text())["rewards"]

    assert done.returncode == 0, done.stdout + done.stderr
    assert {"exact", "exact_trl", "sample"} <= tried.keys() and "all rewards pass" in done.stdout
