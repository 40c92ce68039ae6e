"""The preference loop end to end on the tiny model: the margin rises, a stopped run continues bit for bit."""

import json
import signal

import pytest

from rlbench.tracking.jsonl import read_metrics
from rlbench.training.checkpoint import find_checkpoint
from tests.loops.conftest import run, run_afresh, start
from tests.loops.test_rl_runs import comparable, wait_for
from tests.loops.test_user_errors import check

NUM_STEPS = 16


@pytest.fixture(scope="module")
def overrides(tiny_folder, tmp_path_factory) -> list[str]:
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    sums = [(a, b) for a in range(10) for b in range(10)]
    rows = [{"prompt": f"{a}+{b}=", "chosen": f"a{a}b{b}a", "rejected": f"b{b}a{a}b"} for a, b in sums]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "name=tiny", f"model.path={tiny_folder}", "model.dtype=float32", "hardware.num_threads=1",
        "data=file", f"data.path={file}",
        "preference.pairs_per_step=8", "training.tokens_per_microbatch=60", f"training.num_steps={NUM_STEPS}",
        "evaluation.num_prompts=20", "evaluation.every_steps=4", "optim.lr=0.005",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    done = run_afresh("+exp=dpo_gsm8k", *overrides, "preference.reference=start", "hydra.run.dir=run", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, folder / "run"


def test_the_loss_falls_the_margin_rises_and_held_out_pairs_are_told_apart(finished):
    lines = list(read_metrics(finished[1] / "metrics.jsonl", "train"))
    held_out = list(read_metrics(finished[1] / "metrics.jsonl", "eval"))

    assert len(lines) == NUM_STEPS and len(held_out) == 1 + NUM_STEPS // 4
    assert lines[0]["training/num_microbatches"] > 1
    assert lines[0]["loss/preference"] == pytest.approx(0.6931, abs=1e-3)
    assert lines[-1]["loss/preference"] < 0.4 and lines[-1]["preference/margin"] > 5
    assert held_out[0]["eval/preference_accuracy"] < 0.9 and held_out[-1]["eval/preference_accuracy"] > 0.95


def test_the_user_reads_plan_steps_evaluations_and_summary(finished):
    text = finished[0].stdout

    for expected in ("preference.losses", "1 sigmoid", "prompt and chosen and rejected", f"{NUM_STEPS}/{NUM_STEPS}",
                     "told apart", "What was learned", "margin", "rose", "adapter"):  # fmt: skip
        assert expected in text
    assert "reward" not in text and "Traceback" not in text + finished[0].stderr


def test_a_killed_run_continues_bit_for_bit_with_the_reference_that_it_began_with(finished, overrides, tmp_path):
    arguments = ["+exp=dpo_gsm8k", *overrides, "preference.reference=start", "checkpoint.every_steps=2"]
    process = start(*arguments, "hydra.run.dir=run", folder=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    stopped_at = find_checkpoint(tmp_path / "run")[0].step
    assert 2 <= stopped_at < NUM_STEPS

    resumed = run(*arguments, "resume=run", folder=tmp_path)

    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"{stopped_at} steps are done" in resumed.stdout
    assert comparable(tmp_path / "run") == comparable(finished[1])
    ours, theirs = (find_checkpoint(f)[0].state["adapter_fingerprint"] for f in (tmp_path / "run", finished[1]))
    assert ours == theirs


def test_kto_raises_the_margin_too(overrides, tmp_path):
    done = run(
        "+exp=kto_gsm8k",
        *overrides,
        "evaluation.num_prompts=0",
        "evaluation.every_steps=0",
        "hydra.run.dir=run",
        folder=tmp_path,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl", "train"))
    assert "kl/mismatch" in lines[0]
    assert sum(line["preference/margin"] for line in lines[-4:]) / 4 > 1


def test_bad_rows_are_named(overrides, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")

    check(
        run("+exp=dpo_gsm8k", *overrides, "data.path=bad.jsonl", folder=tmp_path),
        "line 1: chosen and rejected are equal",
    )
