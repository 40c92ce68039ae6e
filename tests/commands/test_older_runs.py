"""A run that an older version recorded: every command takes it, and what it is read as is said."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml

from rlbench.training.checkpoint import _write_manifest
from tests.commands.chat_runs import answers, talk, train
from tests.loops.conftest import end_of_the_fork_server, run, tiny_overrides  # noqa: F401 (fixtures)

STEPS = ["training.num_steps=3", "checkpoint.every_steps=1", "checkpoint.keep_last=3", "engine=hf"]
NOTES = [
    "engine.dequantize=false is read as engine.dense_copies=none",
    "training.recompute=except_attention is read as training.recompute=full",
    "algorithm.replay.max_age=3 is read as 64: nothing reads it",
    "optim.min_lr_frac=0.0 is read as 0.1: nothing reads it",
]
COMMANDS = {
    "replay": ["replay", "run", "--count", "4"],
    "rescore": ["rescore", "run"],
    "eval": ["eval", "run", "evaluation.num_prompts=4"],
    "export": ["export", "run", "exported"],
}


@pytest.fixture(scope="module")
def overrides(tiny_overrides) -> list[str]:  # noqa: F811
    return [*tiny_overrides, *STEPS, "optim.schedule=constant"]


@pytest.fixture(scope="module")
def older(overrides, tmp_path_factory) -> Path:
    """A finished run, its files as a version wrote them that had other names and refused less."""
    folder = train(tmp_path_factory.mktemp("older"), *overrides)
    shutil.copytree(folder, folder.parent / "run_of_today")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    del settings["engine"]["dense_copies"], settings["checkpoint"]["keep_best"], settings["optim"]["galore"]
    settings["engine"]["dequantize"] = False
    settings["training"]["recompute"] = "except_attention"
    settings["algorithm"]["replay"]["max_age"] = 3
    settings["optim"]["min_lr_frac"] = 0.0
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    derived = json.loads((folder / "derived.json").read_text())
    derived["training.recompute"] = {"value": "except_attention", "reason": "memory"}
    derived["engine.dequantize"] = {"value": False, "reason": "no GPU"}
    derived.pop("engine.dense_copies", None)
    (folder / "derived.json").write_text(json.dumps(derived))
    shorten_fingerprints(folder)
    return folder


def shorten_fingerprints(folder: Path) -> None:
    """To the length of those of the weights' bytes; checkpoints say nothing of the settings."""
    for file in folder.glob("rollouts/step-*.parquet"):
        table = pyarrow.parquet.read_table(file)
        rows = [{**row, "adapter_fingerprint": row["adapter_fingerprint"][:16]} for row in table.to_pylist()]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=table.schema), file)
    for file in folder.glob("checkpoints/step-*/state.json"):
        state = json.loads(file.read_text())
        del state["config"]
        file.write_text(json.dumps(state | {"adapter_fingerprint": state["adapter_fingerprint"][:16]}))
        (file.parent / "manifest.json").unlink()
        _write_manifest(file.parent)


def stopped_after_two_steps(older: Path, folder: Path) -> Path:
    shutil.copytree(older, folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints" / "step-000003")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_it_and_says_what_it_reads_it_as(older, command):
    done = run(*COMMANDS[command], folder=older.parent)

    assert done.returncode == 0, done.stdout + done.stderr
    for note in NOTES:
        assert done.stderr.count(f"note: run/config.yaml: {note}\n") == 1


def test_its_rollouts_are_replayed_although_its_fingerprints_cannot_be_compared(older):
    done = run("replay", "run", "--count", "20", folder=older.parent)

    assert "older rlbench took the run's fingerprints, so those of its weights are not compared" in done.stdout
    assert done.stdout.count(": identical, ") == 20 and "20 of 20 rollouts are identical" in done.stdout


def test_a_run_of_today_is_not_replayed_with_other_weights(older):
    rollouts = older.parent / "run_of_today" / "rollouts" / "step-000001.parquet"
    name = pyarrow.parquet.read_table(rollouts)["rollout_id"][0].as_py()

    done = run("replay", "run_of_today", "--id", name, "seed=5", folder=older.parent)

    assert done.returncode == 2 and "the one that was rebuilt has" in done.stderr


def test_its_policy_answers(older):
    done = talk(older, said=["1+1"])

    assert done.returncode == 0 and len(answers(done.stdout)) == 1, done.stdout + done.stderr
    assert done.stderr.count(NOTES[0]) == 1


@pytest.mark.parametrize("command", [["report", "run"], ["diff", "run", "run_b"]], ids=lambda command: command[0])
def test_its_numbers_are_shown(older, command):
    if not (older.parent / "run_b").exists():
        shutil.copytree(older, older.parent / "run_b")

    done = run(*command, folder=older.parent)

    assert done.returncode == 0, done.stdout + done.stderr


def test_it_goes_on_without_a_warning_of_what_it_is_read_as(older, overrides, tmp_path):
    folder = stopped_after_two_steps(older, tmp_path)

    done = run(*overrides, "resume=run", folder=folder)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "training.recompute=full" in done.stdout and "Finished 3 steps" in done.stdout
    assert "in the run that is resumed" not in done.stdout + done.stderr
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["engine"]["dense_copies"] == "none"


def test_what_the_call_sets_is_refused_as_in_a_new_run(older, overrides, tmp_path):
    folder = stopped_after_two_steps(older, tmp_path)

    resumed = run(*overrides, "algorithm.replay.max_age=3", "resume=run", folder=folder)
    evaluated = run("eval", "run", "rewards.gated_value=-1.0", folder=folder)

    assert (resumed.returncode, evaluated.returncode) == (2, 2)
    assert "error: algorithm.replay.max_age is 3, but algorithm.replay.is_on is false; expected 64" in resumed.stderr
    assert "error: rewards.gated_value is -1.0, but no component has a gate_min" in evaluated.stderr
    assert "Traceback" not in resumed.stderr + evaluated.stderr


def test_a_setting_that_is_gone_is_one_sentence_with_its_name(older, tmp_path):
    shutil.copytree(older, tmp_path / "run")
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    settings["sampling"]["num_beams"] = 4
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))

    done = run("rescore", "run", folder=tmp_path)

    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "run/config.yaml has sampling.num_beams=4, which this version of rlbench does not know" in done.stderr
