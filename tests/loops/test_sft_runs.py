"""Supervised fine-tuning end to end on the tiny model: the loss falls, a stopped run continues, GRPO starts from it."""

import json
import shutil
import signal

import pytest
from safetensors.torch import load_file

from rlbench.tracking.jsonl import read_metrics
from rlbench.training.checkpoint import find_checkpoint
from tests.loops.conftest import run, run_afresh, start
from tests.loops.test_rl_runs import comparable, wait_for
from tests.loops.test_user_errors import check

NUM_STEPS = 16


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    given = [{"question": f"{a}+{b}", "answer": "aaa" if a % 2 else "aab"} for a in range(8) for b in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    return file


@pytest.fixture(scope="module")
def overrides(rows, tiny_folder) -> list[str]:
    return [
        "+exp=sft_gsm8k", "name=tiny", f"model.path={tiny_folder}", "model.dtype=float32", "hardware.num_threads=1",
        f"data.path={rows}",
        "data.system_prompt=null", "data.examples=[]", "sft.rows_per_step=8", "training.tokens_per_microbatch=80",
        f"training.num_steps={NUM_STEPS}", "evaluation.num_prompts=8", "evaluation.every_steps=4", "optim.lr=0.02",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    done = run_afresh(*overrides, "hydra.run.dir=run", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, folder / "run"


def test_the_loss_falls_on_training_rows_and_on_held_out_rows(finished):
    lines = list(read_metrics(finished[1] / "metrics.jsonl", "train"))
    held_out = [line["eval/loss"] for line in read_metrics(finished[1] / "metrics.jsonl", "eval")]

    assert len(lines) == NUM_STEPS and len(held_out) == 1 + NUM_STEPS // 4
    assert lines[0]["training/num_microbatches"] > 1
    assert lines[-1]["loss/nll"] < 0.3 * lines[0]["loss/nll"]
    assert held_out[-1] < 0.3 * held_out[0]


def test_the_user_reads_plan_steps_evaluations_and_summary(finished):
    text = finished[0].stdout

    for expected in ("sft.rows_per_step", "question and answer", f"{NUM_STEPS}/{NUM_STEPS}", "nats a token",
                     "What was learned", "fell", "What to run next", "adapter"):  # fmt: skip
        assert expected in text
    assert "reward" not in text and "Traceback" not in text + finished[0].stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_continues_bit_for_bit(finished, overrides, tmp_path, how):
    arguments = [*overrides, "checkpoint.every_steps=2"]
    process = start(*arguments, "hydra.run.dir=run", folder=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 5, process)
    process.send_signal(how)
    output = process.communicate(timeout=60)[0]
    if how == signal.SIGINT:
        assert process.returncode == 130 and "finishing this step, then saving" in output, output
    stopped_at = find_checkpoint(tmp_path / "run")[0].step
    assert 2 <= stopped_at < NUM_STEPS

    resumed = run(*arguments, "resume=run", folder=tmp_path)

    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"{stopped_at} steps are done" in resumed.stdout
    assert comparable(tmp_path / "run") == comparable(finished[1])
    ours, theirs = (find_checkpoint(f)[0].state["adapter_fingerprint"] for f in (tmp_path / "run", finished[1]))
    assert ours == theirs


def test_a_run_with_dropout_continues_bit_for_bit(finished, overrides, tmp_path):
    arguments = [*overrides, "lora.dropout=0.3", "checkpoint.every_steps=4", "checkpoint.keep_last=9"]
    whole = run(*arguments, "hydra.run.dir=run", folder=tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "dropout 0.3" in whole.stdout
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for step in (12, 16):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step-{step:06d}")

    resumed = run(*arguments, "resume=again", folder=tmp_path)

    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "8 steps are done" in resumed.stdout
    assert comparable(tmp_path / "again") == comparable(tmp_path / "run")
    ours, theirs = (find_checkpoint(tmp_path / f)[0].state["adapter_fingerprint"] for f in ("again", "run"))
    assert ours == theirs
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["lora_dropout"] == 0.3
    losses, without = (
        [line["loss/nll"] for line in read_metrics(folder / "metrics.jsonl", "train")]
        for folder in (tmp_path / "run", finished[1])
    )
    assert losses[0] == without[0] and all(a != b for a, b in zip(losses[1:], without[1:], strict=True))  # B is zero
    assert losses[-1] < 0.5 * losses[0]


def test_grpo_starts_from_the_adapter(finished, tiny_overrides, tmp_path):
    options = ["training.num_steps=1", "optim.lr=1e-12", f"lora.init_from={finished[1]}", "hydra.run.dir=run"]
    done = run(*tiny_overrides, *options, folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl", "train")
    assert line["reward/mean"] > 0.5  # the share of the letter a; about 0.01 without
    before, after = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (finished[1], tmp_path / "run"))
    assert all(abs(after[name] - before[name]).max() < 1e-9 for name in before)


def test_settings_of_other_stages_are_errors(tmp_path):
    check(
        run("+exp=sft_gsm8k", "sampling.max_tokens=9", folder=tmp_path),
        "sampling.max_tokens is 9, but stage=sft does not read it; expected its default",
    )
    check(run("stage=sft", folder=tmp_path), "stage=sft does not read it; expected its default (rewards=none)")
    check(run("sft.loss_on=all", folder=tmp_path), "sft.loss_on is all, but stage=rl does not read it")
    check(
        run("stage=sfd", folder=tmp_path),
        "stage is 'sfd', expected one of: rl, sft, preference, reward_model; did you mean sft?",
    )


def test_bad_rows_are_named(overrides, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a", "completion": 3}) + "\n")

    check(
        run(*overrides, "data.path=bad.jsonl", folder=tmp_path),
        "line 1: column 'completion' is 3, expected text or a list of messages",
    )


def test_an_adapter_that_is_nowhere(overrides, tmp_path):
    check(run(*overrides, "lora.init_from=nowhere", folder=tmp_path), "lora.init_from is nowhere, but no adapter_model")
