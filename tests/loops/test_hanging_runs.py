"""Runs that hang, or take too long to stop: they end by themselves, and go on from the last whole step."""

import signal
import time
from pathlib import Path

import pytest

from rlbench.tracking.jsonl import read_metrics
from rlbench.training.checkpoint import find_checkpoint
from tests.loops.conftest import SERVER, run
from tests.loops.forked import ForkedProcess
from tests.loops.test_rl_runs import comparable, sampled

# Each is called at the start of `step` and must not come back.
HANGS = {
    "python": "import time; time.sleep(1000)",
    "c": """
    import ctypes
    lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)  # a deadlock that no signal ends""",
}
PLACES = {  # phase -> module, name of the function that the phase calls once a step
    "generation": ("rlbench.loops.rl", "sample_completions"),
    "rewards": ("rlbench.loops.rl", "make_groups"),
    "identity": ("rlbench.checks.policy_identity", "check_completions"),
    "update": ("rlbench.loops.rl", "update_policy"),
    "weight_sync": ("rlbench.loops.rl", "sync"),
    "recording": ("rlbench.loops.rl", "write_rollouts"),
    "checkpoint": ("rlbench.loops.training_loop", "save_checkpoint"),
}
PROGRAM = """
import importlib, sys
module = importlib.import_module({module!r})
real, calls = getattr(module, {name!r}), []
def hang():
    {body}
def hanging(*arguments, **options):
    calls.append(1)
    if len(calls) == {call}:
        hang()
    return real(*arguments, **options)
setattr(module, {name!r}, hanging)
from rlbench.__main__ import main
sys.argv = ["rlbench", *sys.argv[1:]]
main()
"""


def start_hanging(phase: str, how: str, call: int, overrides: list[str], folder: Path) -> ForkedProcess:
    module, name = PLACES[phase]
    program = PROGRAM.format(module=module, name=name, body=HANGS[how], call=call)
    return SERVER.start([*overrides, "hydra.run.dir=run"], folder, program=program)


@pytest.fixture(scope="module")
def settings(tiny_overrides) -> list[str]:
    return [*tiny_overrides, "training.num_steps=4", "evaluation.num_prompts=0", "checkpoint.every_steps=10",
            "rewards.timeout_s=1.5"]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run(*settings, "hydra.run.dir=run", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def goes_on_like(undisturbed: Path, settings: list[str], folder: Path) -> None:
    done = run(*settings, "resume=run", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert comparable(folder / "run") == comparable(undisturbed)
    assert sampled(folder / "run") == sampled(undisturbed)


@pytest.mark.parametrize("phase", ["generation", "rewards", "update"])
def test_a_phase_that_hangs_ends_the_run_with_what_was_done_before(settings, undisturbed, tmp_path, phase):
    limits = [f"+watchdog.phase_limits_s.{phase}=2", "watchdog.grace_s=30"]

    process = start_hanging(phase, "python", 3, [*settings, *limits], tmp_path)
    _, errors = process.communicate(timeout=120)

    assert process.returncode == 9, errors
    stacks = tmp_path / "run" / f"stacks_{phase}.txt"
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: step 3: {phase}: no progress for 2 s (watchdog.phase_limits_s.{phase})"), errors
    assert str(Path("run") / stacks.name) in line and "to go on: resume=" in line and "step-000002" in line
    assert "hang" in stacks.read_text() and "Thread" in stacks.read_text()
    assert find_checkpoint(tmp_path / "run")[0].step == 2
    if phase == "update":
        goes_on_like(undisturbed, settings, tmp_path)


@pytest.mark.parametrize("phase", ["weight_sync", "recording"])
def test_after_the_weights_have_changed_the_last_checkpoint_counts(settings, tmp_path, phase):
    limits = [f"+watchdog.phase_limits_s.{phase}=2", "checkpoint.every_steps=1"]
    call = {"weight_sync": 4, "recording": 3}[phase]  # the first sync comes before the first step

    process = start_hanging(phase, "python", call, [*settings, *limits], tmp_path)
    _, errors = process.communicate(timeout=120)

    assert process.returncode == 9, errors
    assert "had begun to change the weights, so it is lost" in " ".join((_ + errors).split())
    assert "step-000002" in errors and find_checkpoint(tmp_path / "run")[0].step == 2


@pytest.mark.parametrize("phase", ["generation", "checkpoint"])
def test_a_hang_outside_of_python_is_ended_too(settings, undisturbed, tmp_path, phase):
    limits = [f"+watchdog.phase_limits_s.{phase}=2", "watchdog.grace_s=2", "checkpoint.every_steps=1"]

    process = start_hanging(phase, "c", 3, [*settings, *limits], tmp_path)
    _, errors = process.communicate(timeout=120)

    assert process.returncode == 9, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert f"{phase}: no progress for 2 s" in line and "did not end within 2 s (watchdog.grace_s)" in line
    assert "to go on: resume=" in line
    assert "hang" in (tmp_path / "run" / f"stacks_{phase}.txt").read_text()
    assert find_checkpoint(tmp_path / "run")[0].step == 2
    if phase == "checkpoint":
        goes_on_like(undisturbed, [*settings, "checkpoint.every_steps=1"], tmp_path)


def test_slow_work_that_goes_on_is_no_hang(tiny_overrides, tmp_path):
    """Generation takes over four times the limit, a token at a time."""
    program = """
import sys, time
from rlbench.engine import hf_engine
real = hf_engine.draw_tokens
def slow(*arguments):
    time.sleep(0.4)
    return real(*arguments)
hf_engine.draw_tokens = slow
from rlbench.__main__ import main
sys.argv = ["rlbench", *sys.argv[1:]]
main()
"""
    overrides = [*tiny_overrides, "training.num_steps=1", "evaluation.num_prompts=0", "hydra.run.dir=run"]

    done = run(*overrides, "+watchdog.phase_limits_s.generation=1", program=program, folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl", "train")
    assert line["time/generation_s"] > 4


def test_rewards_that_go_on_are_no_hang(settings, tmp_path):
    slow = "+rewards.components.slow={path:tests.loops.letter_reward.takes_a_moment}"
    limit = ["+watchdog.phase_limits_s.rewards=2", "rewards.num_workers=2"]

    done = run(*settings, slow, *limit, "training.num_steps=1", "hydra.run.dir=run", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl", "train")
    assert line["time/rewards_s"] > 6


@pytest.mark.parametrize("how", ["python", "c"])
def test_a_step_that_does_not_end_is_given_up_after_sigterm(settings, tmp_path, how):
    overrides = [*settings, "training.stop_grace_s=2", "checkpoint.every_steps=1"]
    process = start_hanging("rewards", how, 3, overrides, tmp_path)
    wait_for_steps(tmp_path / "run", 2, process)
    time.sleep(1)  # it hangs in step 3

    start_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)

    assert process.returncode == 143, out + errors
    assert 2 < time.monotonic() - start_s < 12
    assert "rewards was given up after 2 s (training.stop_grace_s)" in errors and "to go on: resume=" in errors
    assert "Traceback" not in errors
    assert find_checkpoint(tmp_path / "run")[0].step == 2


def test_what_was_before_the_step_that_is_given_up_is_saved(settings, undisturbed, tmp_path):
    process = start_hanging("generation", "python", 3, [*settings, "training.stop_grace_s=1"], tmp_path)
    wait_for_steps(tmp_path / "run", 2, process)
    time.sleep(1)
    assert not (tmp_path / "run" / "checkpoints").exists()

    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)

    assert process.returncode == 143, out + errors
    assert find_checkpoint(tmp_path / "run")[0].step == 2
    goes_on_like(undisturbed, settings, tmp_path)


def wait_for_steps(run_folder: Path, num_steps: int, process: ForkedProcess) -> None:
    metrics, deadline = run_folder / "metrics.jsonl", time.monotonic() + 90
    while not metrics.exists() or metrics.read_text().count('"phase": "train"') < num_steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("watchdog.limit_s=-1", "watchdog.limit_s is -1.0, expected at least 0"),
        ("watchdog.grace_s=0", "watchdog.grace_s is 0.0, expected more than 0"),
        ("+watchdog.phase_limits_s.genration=3", "names 'genration', expected phases: generation"),
        ("watchdog.limit_s=1", "rewards.timeout_s is 1.5, expected less than the 1 s after which a run without"),
        ("training.stop_grace_s=0", "training.stop_grace_s is 0.0, expected more than 0"),
    ],
)
def test_a_limit_that_cannot_be_is_one_sentence(settings, tmp_path, override, sentence):
    done = run(*settings, override, folder=tmp_path)

    assert done.returncode == 2, done.stdout + done.stderr
    assert sentence in done.stderr and "Traceback" not in done.stderr
