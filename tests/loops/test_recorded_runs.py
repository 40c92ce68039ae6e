"""What was recorded can be sampled again token for token, and scored again with the same or other rewards."""

import os
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.loops.conftest import run, run_afresh

NUM_STEPS = 6


@pytest.fixture(scope="module")
def recorded(tiny_overrides, tmp_path_factory) -> Path:
    """A run whose every policy was kept."""
    folder = tmp_path_factory.mktemp("recorded")
    settings = [f"training.num_steps={NUM_STEPS}", "checkpoint.every_steps=1", f"checkpoint.keep_last={NUM_STEPS}"]
    done = run(*tiny_overrides, *settings, "hydra.run.dir=run", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_fifty_rollouts_are_replayed_token_for_token(recorded):
    done = run_afresh("replay", "run", "--count", "50", folder=recorded.parent)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": identical, ") == 50 and "50 of 50 rollouts are identical" in done.stdout


def test_a_rollout_that_was_tampered_with_differs_at_that_token(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path / "run")
    file = tmp_path / "run" / "rollouts" / "step-000004.parquet"
    table = pyarrow.parquet.read_table(file)
    rows = table.to_pylist()
    rows[5]["token_ids"][2] += 1
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=table.schema), file)

    done = run("replay", "run", "--id", rows[5]["rollout_id"], folder=tmp_path)

    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{rows[5]['rollout_id']}: differs at token 2: " in done.stdout
    assert "0 of 1 rollouts are identical" in done.stdout


@pytest.mark.parametrize("command", ["replay", "rescore"])
def test_a_damaged_rollout_file_is_no_mistake_of_the_settings(recorded, tmp_path, command):
    shutil.copytree(recorded, tmp_path / "run")
    os.truncate(tmp_path / "run" / "rollouts" / "step-000002.parquet", 100)

    done = run(command, "run", folder=tmp_path)

    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert "error: cannot read the rollouts in run/rollouts/step-000002.parquet" in done.stderr


@pytest.mark.parametrize("command", ["replay", "rescore"])
def test_files_that_no_run_wrote_are_left_alone(recorded, tmp_path, command):
    shutil.copytree(recorded, tmp_path / "run")
    (tmp_path / "run" / "rollouts" / "step-abc.parquet").write_text("notes")

    done = run(command, "run", folder=tmp_path)

    assert done.returncode == 0, done.stderr


def test_weights_that_were_not_kept_are_named(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000003")
    name = pyarrow.parquet.read_table(recorded / "rollouts" / "step-000004.parquet")["rollout_id"][0].as_py()

    done = run("replay", "run", "--id", name, folder=tmp_path)

    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"rollout {name} was sampled by policy version 3, of which no checkpoint was kept" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["replay"], "replay needs the folder of a run"),
        (["replay", "run", "--cuont", "2"], "replay has no option --cuont; expected: python -m rlbench replay RUN"),
        (["replay", "nowhere"], "there is no folder nowhere"),
        (["replay", "run", "--count", "0"], "--count is 0, expected at least 1"),
        (["replay", "run", "--id", "99/train/1/0"], "no rollouts of its step were recorded"),
        (["replay", "run", "--id", "1/train/1/77"], "which is not in"),
        (["rescore", "run", "--steps", "a"], "--steps is a, expected FIRST:LAST"),
        (["rescore", "run", "--steps", "90:99"], "holds no rollouts of steps 90 to 99"),
        (["rescore", "run", "lora.rank=8"], "so lora.rank=8 would change nothing"),
        (["rescore", "run", "rewards=mth"], "rewards=mth: there is no such choice"),
        (["rescore", "run", "rewards.timeout=3"], "there is no key 'rewards.timeout'"),
        (["rescore", "run", "~rewards.components.other"], "the run has no rewards.components.other"),
    ],
)
def test_a_mistake_is_one_sentence(recorded, arguments, sentence):
    done = run(*arguments, folder=recorded.parent)

    assert done.returncode == 2, done.stdout + done.stderr
    assert sentence in done.stderr and "Traceback" not in done.stderr


def test_the_same_rewards_give_the_recorded_values(recorded):
    done = run_afresh("rescore", "run", folder=recorded.parent)

    assert done.returncode == 0, done.stdout + done.stderr
    num_rollouts = NUM_STEPS * 32
    assert f"{num_rollouts} rollouts" in done.stdout
    assert f"advantages: 0 of {num_rollouts} changed, 0 of them in sign" in done.stdout


def test_other_rewards_are_compared_with_the_recorded_ones(recorded):
    added = "rewards.components.rare={path: tests.loops.letter_reward.rarely, weight: 2.0}"

    done = run("rescore", "run", "--steps", "1:2", added, "~rewards.components.share", folder=recorded.parent)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "64 rollouts" in done.stdout and "rare" in done.stdout and " -> " in done.stdout
    assert "advantages: 0 of" not in done.stdout


def test_empty_completions_are_shown_as_such_and_have_no_advantages(recorded, tmp_path):
    shutil.copytree(recorded / "rollouts", tmp_path / "run" / "rollouts")
    for name in ("config.yaml", "derived.json"):
        shutil.copy(recorded / name, tmp_path / "run" / name)
    file = tmp_path / "run" / "rollouts" / "step-000002.parquet"
    table = pyarrow.parquet.read_table(file)
    rows = table.to_pylist()
    for row in (rows[3], *rows[8:16]):  # one of a group, and a whole group
        row |= {"token_ids": [], "sampling_logprobs": [], "completion_text": ""}
    rows[3]["reward"] = 99.0  # which nothing may be compared with
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=table.schema), file)

    done = run("rescore", "run", "--steps", "2", folder=tmp_path)

    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert "empty completions: 9 of 32; they have no tokens, so no advantages" in done.stdout
    assert "advantages: 0 of 23 changed" in done.stdout
    assert f"{rows[3]['rollout_id']}: 99 -> 0\n(empty completion: no tokens)\n" in done.stdout


def test_a_reward_that_breaks_is_said(recorded):
    broken = "rewards.components.share={path: tests.loops.letter_reward.takes_a_minute}"

    done = run("rescore", "run", "--steps", "1", broken, "rewards.timeout_s=0.2", folder=recorded.parent)

    assert done.returncode == 1, done.stdout + done.stderr
    assert "share: timeout" in done.stdout and "advantages are not compared" in done.stdout
