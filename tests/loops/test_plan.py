"""`plan` on the tiny model."""

import json

import pytest

from rlbench.tracking.jsonl import read_metrics
from tests.loops.conftest import run, run_afresh


def test_a_plan_measures_prints_and_leaves_the_numbers(tiny_overrides, tmp_path):
    done = run_afresh("plan", *tiny_overrides, "training.num_steps=3", "hydra.run.dir=plan", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "plan" / "plan.json").read_text())
    made, probes = record["plan"], record["probes"]
    for part in (*made["memory_gib"], "training.tokens_per_microbatch=", "sampling.max_tokens", "generation", "update"):
        assert part in done.stdout
    assert record["fits"] and 0 < made["peak_gib"] < made["limit_gib"]
    assert probes["base_bytes"] == 4 * sum(
        [98 * 64 * 2, 64, 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64)]  # embedding, head, norms, 2 layers
    )
    assert probes["moments"] == {"device": 2 * probes["adapter_bytes"], "paged": 0}
    assert [p["size"] for p in probes["update"]] == sorted({p["size"] for p in probes["update"]})
    assert not (tmp_path / "plan" / "metrics.jsonl").exists()


def test_a_microbatch_that_holds_one_sample_gives_one_size_and_still_a_plan(tiny_overrides, tmp_path):
    sizes = ["sampling.max_tokens=16", "training.tokens_per_microbatch=40"]
    done = run("plan", *tiny_overrides, *sizes, "training.num_steps=1", "hydra.run.dir=plan", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    probes = json.loads((tmp_path / "plan" / "plan.json").read_text())["probes"]
    assert len({p["size"] for p in probes["update"]} - {0}) == 1
    assert probes["update"][0] == {"size": 0, "seconds": 0.0, "peak_bytes": probes["warm_bytes"]}


@pytest.mark.parametrize("experiment", ["sft_gsm8k", "kto_gsm8k", "reward_model_gsm8k"])
def test_a_plan_of_a_run_on_given_rows_is_near_what_the_run_takes(experiment, tiny_folder, tmp_path):
    rows = [{"question": f"{a}+{b}", "answer": "1+" * (9 + a) + str(a + b)} for a in range(8) for b in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"+exp={experiment}", f"model.path={tiny_folder}", "model.dtype=float32", "hardware.num_threads=1",
        "tracking.wandb=disabled",
        f"data.path={tmp_path}/rows.jsonl", "data.system_prompt=null", "data.examples=[]",
        "data.prompt_column=question", "data.answer_column=answer", "training.tokens_per_microbatch=200",
        "training.num_steps=2",
        "evaluation.num_prompts=0",
    ]  # fmt: skip
    done = run("plan", *overrides, "hydra.run.dir=plan_1", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "plan_1" / "plan.json").read_text())
    made, probes = record["plan"], record["probes"]
    assert "sampling.max_tokens" not in done.stdout and "engine" not in done.stdout
    assert sum(made["memory_gib"].values()) == pytest.approx(made["peak_gib"])
    assert list(made["time_s"]) == ["update"] and made["time_s"]["update"] > 0
    assert probes["update"][-1]["size"] == probes["microbatch_tokens"]
    assert not (tmp_path / "plan_1" / "metrics.jsonl").exists()

    done = run(*overrides, "hydra.run.dir=run", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["plan"] == made
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl", "train")
    assert made["peak_gib"] == pytest.approx(max(step["memory/peak_gib"] for step in steps), rel=0.1)
    assert max(step["training/num_tokens"] for step in steps) == probes["step_tokens"]
    assert "Planned and actual" in (tmp_path / "run" / "report.html").read_text()


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


def test_a_plan_above_the_cap_does_not_fit(tiny_overrides, tmp_path):
    cap = ["hardware.memory_gib=0.25", "training.num_steps=1", "hydra.run.dir=plan"]
    done = run("plan", *tiny_overrides, *cap, folder=tmp_path)

    assert done.returncode == 7, done.stdout + done.stderr
    record = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert record["plan"]["limit_gib"] == 0.25 and not record["fits"]
