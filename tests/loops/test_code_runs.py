"""The code experiment: composed, planned, trained on a tiny model; its reward on trial."""

import json

import pytest

from tests.data.code_files import ROWS, write
from tests.loops.conftest import run, run_afresh


def overrides(name: str, tiny_folder, folder) -> list[str]:
    return [
        "+exp=grpo_code",
        f"data={name}",
        f"data.path={write(folder / 'rows.jsonl', ROWS[name])}",
        "data.system_prompt=null",
        f"model.path={tiny_folder}",
        "hardware.num_threads=1",  # the model is tiny
        "model.dtype=float32",
        "sampling.max_tokens=12",
    ]


@pytest.mark.parametrize("name", ROWS)
def test_a_run_on_code_rows_scores_every_completion_in_a_sandbox(name, tiny_folder, tmp_path):
    sizes = ["algorithm.prompts_per_step=2", "algorithm.group_size=2", "evaluation.num_prompts=2"]
    done = run(*overrides(name, tiny_folder, tmp_path), *sizes, "training.num_steps=1", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    (metrics,) = tmp_path.glob("outputs/grpo_code/*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    step = next(row for row in rows if "reward_pool/num_value" in row)
    assert step["reward_pool/num_value"] == 4 and step["reward_pool/num_error"] == 0
    assert step["reward/tests"] == 0.0  # random letters are no program
    assert "rewards.components.tests: programs run in the sandbox backend" in " ".join(done.stdout.split())


def test_the_code_experiment_is_planned(tiny_folder, tmp_path):
    done = run("plan", *overrides("mbpp", tiny_folder, tmp_path), folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ROWS)
def test_the_reward_trial_runs_the_rows_own_solutions(name, tiny_folder, tmp_path):
    done = run_afresh(
        "reward", "test", *overrides(name, tiny_folder, tmp_path), "--json", "trial.json", folder=tmp_path
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "programs run in the sandbox backend" in " ".join(done.stdout.split())
    checks = {c["name"]: c for c in json.loads((tmp_path / "trial.json").read_text())["rewards"]["tests"]["checks"]}
    if name == "livecodebench":
        assert checks["gold answers"]["text"] == "12 of 12 rows hold none"
    else:
        assert checks["gold answers"]["text"] == "all 12 score 1" and checks["shuffled answers"]["verdict"] == "pass"
