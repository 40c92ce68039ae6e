"""Runs killed where a resume is hardest; every kind of run and moment: scripts/soak_kills.py."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlbench.commands.train import _find_resume, _metrics_file, _save_result, _tracker
from rlbench.config.schema import RunConfig, TrackingConfig
from rlbench.tracking.console import RunConsole
from rlbench.tracking.jsonl import JsonlWriter, read_metrics
from rlbench.tracking.rollout_store import rollouts_path, write_rollouts
from rlbench.training.checkpoint import Checkpoint
from tests.loops.conftest import run
from tests.loops.self_kill import program

CONSOLE = RunConsole(quiet=True)


def record(folder, *lines: tuple[int, str]) -> None:
    writer = JsonlWriter(folder / "metrics.jsonl")
    for step, phase in lines:
        writer.write(step, {}, phase)
        write_rollouts(folder, step, [], {}, phase=phase)
    writer.close()


def recorded(folder) -> list[tuple[int, str]]:
    return [(line["step"], line["phase"]) for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("moment", ["update 1 .", "line 2 ."])
def test_a_run_killed_before_its_first_checkpoint_begins_again_with_the_same_command(moment, tiny_overrides, tmp_path):
    arguments = [*tiny_overrides, "training.num_steps=1", "hydra.run.dir=run", "resume=auto"]
    killed = run(*arguments, program=program(moment), folder=tmp_path)
    assert killed.returncode == -signal.SIGKILL and recorded(tmp_path / "run") == [(0, "eval")]
    is_torn = not (tmp_path / "run" / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert is_torn == (moment == "line 2 .")

    done = run(*arguments, folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "has no checkpoint yet: its run begins again" in " ".join(done.stdout.split())
    assert recorded(tmp_path / "run") == [(0, "eval"), (1, "train"), (1, "eval")]


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_that_run_begins_again_even_if_one_beside_it_has_a_checkpoint(tmp_path, resume):
    folder, beside = tmp_path / "run", tmp_path / "beside" / "checkpoints" / "step-000001"
    record(folder, (0, "eval"), (1, "train"))
    beside.mkdir(parents=True)
    (beside / "manifest.json").write_text('{"format": 1, "files": {}}')
    (beside / "state.json").write_text('{"step": 1}')
    (folder / "checkpoints" / ".step-000001.7").mkdir(parents=True)  # being written when it was killed

    config = RunConfig(resume="auto" if resume == "auto" else str(folder))
    assert _find_resume(config, folder, CONSOLE) == (None, folder)
    _metrics_file(None, folder, CONSOLE).close()

    assert recorded(folder) == [] and not list((folder / "rollouts").iterdir())


def test_a_run_that_ended_and_lost_its_checkpoints_is_not_begun_again(tmp_path):
    record(tmp_path, (0, "eval"), (1, "train"))
    (tmp_path / "report.html").touch()

    with pytest.raises(ValueError, match="no valid checkpoint is there"):
        _find_resume(RunConfig(resume=str(tmp_path)), tmp_path / "new", CONSOLE)
    with pytest.raises(Exception, match="holds an earlier run's metrics"):
        _metrics_file(None, tmp_path, CONSOLE)
    assert recorded(tmp_path) == [(0, "eval"), (1, "train")]


def test_what_came_after_the_checkpoint_goes_also_an_evaluation_at_its_step(tmp_path):
    """Stopped at step 2, whose evaluation was put off; resumed, evaluated, killed before the next checkpoint."""
    record(tmp_path, (0, "eval"), (1, "train"), (2, "train"), (2, "eval"), (3, "train"))
    later = tmp_path / "checkpoints" / "step-000003"
    later.mkdir(parents=True)
    state = {"step": 2, "evaluations": [{"step": 0}]}

    _metrics_file(Checkpoint(folder=tmp_path, state=state), tmp_path, CONSOLE).close()

    assert recorded(tmp_path) == [(0, "eval"), (1, "train"), (2, "train")]
    assert not later.exists()
    kept = [rollouts_path(tmp_path, step, phase).exists() for step, phase in ((2, "train"), (2, "eval"), (3, "train"))]
    assert kept == [True, False, False]


def test_settings_are_replaced_whole_so_that_a_kill_in_a_resume_leaves_those_that_the_next_one_compares(
    tmp_path, monkeypatch
):
    config = RunConfig(tracking=TrackingConfig(wandb="disabled"))
    inputs = SimpleNamespace(config=config, derived=[])
    record(tmp_path, (0, "eval"), (1, "train"))
    (tmp_path / "config.yaml").write_text("name: old\n")
    state = {"step": 1, "evaluations": [{"step": 0}]}
    replaced = []

    def killed(source, target):
        replaced.append(Path(target).name)
        if replaced[-1] == "config.yaml":
            raise KeyboardInterrupt
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        _tracker(inputs, Checkpoint(folder=tmp_path, state=state), tmp_path, CONSOLE)  # pyright: ignore[reportArgumentType]

    assert (tmp_path / "config.yaml").read_text() == "name: old\n"
    assert replaced == ["metrics.jsonl", "config.yaml"] and recorded(tmp_path) == [(0, "eval"), (1, "train")]


def test_a_result_is_replaced_whole_or_stays(tmp_path):
    def save_result(folder, name):
        result = folder / "adapter"
        result.mkdir()
        (result / "config").write_text(name)
        if name == "killed":
            raise KeyboardInterrupt
        (result / f"weights of {name}").touch()
        return result

    parts = SimpleNamespace(policy=SimpleNamespace(save_result=save_result))
    for name in ("first", "killed", "second"):
        with suppress(KeyboardInterrupt):
            assert _save_result(parts, tmp_path, name) == tmp_path / "adapter"  # pyright: ignore[reportArgumentType]
        found = {file.name for file in (tmp_path / "adapter").iterdir()}
        assert found == {"config", "weights of second" if name == "second" else "weights of first"}
        assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
