"""`plan` on the tiny model."""

import json

import pytest

from rlbench.tracking.jsonl import read_metrics
from tests.loops.conftest import run


def test_a_plan_measures_prints_and_leaves_the_numbers(tiny_overrides, tmp_path):
    done = run("plan", *tiny_overrides, "training.num_steps=3", "hydra.run.dir=plan", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "plan" / "plan.json").read_text())
    made, probes = record["plan"], record["probes"]
    for part in (*made["memory_gib"], "training.tokens_per_microbatch=", "sampling.max_tokens", "generation", "update"):
        assert part in done.stdout
    assert record["fits"] and 0 < made["peak_gib"] < made["limit_gib"]
    assert probes["base_bytes"] == 4 * sum(
        [98 * 64 * 2, 64, 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64)]  # embedding, head, norms, 2 layers
    )
    assert [p["size"] for p in probes["update"]] == sorted({p["size"] for p in probes["update"]})
    assert not (tmp_path / "plan" / "metrics.jsonl").exists()


def test_a_plan_of_another_stage_is_refused_in_one_sentence(tiny_folder, tmp_path):
    done = run("plan", "+exp=sft_gsm8k", f"model.path={tiny_folder}", folder=tmp_path)

    assert done.returncode == 2 and "stage is sft, but plan measures online runs only" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_run_leaves_its_plan_and_the_memory_of_each_phase(tiny_overrides, tmp_path):
    done = run(*tiny_overrides, "training.num_steps=1", "hydra.run.dir=run", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert record["source"].startswith("formula") and record["plan"]["time_s"] == {}
    (step,) = read_metrics(tmp_path / "run" / "metrics.jsonl", "train")
    phases = ("generation", "rewards", "update", "weight_sync")
    assert step["memory/peak_gib"] >= max(step[f"memory/{phase}_gib"] for phase in phases) > 0.1
    assert record["plan"]["peak_gib"] == pytest.approx(step["memory/peak_gib"], rel=0.2)
    assert "Planned and actual" in (tmp_path / "run" / "report.html").read_text()
