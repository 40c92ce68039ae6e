"""The collector of GSM8K runs: which numbers it takes, and that no path of a machine gets into a result."""

import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
EVALUATION = {"phase": "eval", "eval/num": 8.0, "eval/accuracy": 0.25, "eval/sampled_accuracy": 0.125}


@pytest.fixture
def collector(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import collect_gsm8k

    yield collect_gsm8k
    sys.modules.pop("collect_gsm8k", None)


def write(folder: Path, lines: list[dict]) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def made_chain(folder: Path) -> Path:
    write(folder / "1_sft", [{"phase": "train", "time/step_s": 2.0, "loss/total": 8.0 - i} for i in range(8)])
    steps = [
        {
            "phase": "train", "time/step_s": 3.0, "reward/mean": i / 20, "groups/no_signal_frac": 0.5,
            "drift/ess_frac": 1 - i / 100, "drift/level": float(i > 17), "memory/peak_gib": 1.0 + i, "step": i + 1,
            "accuracy/train": 0.05,
        }
        | ({"identity/rollout_gap_mean": 0.01, "identity/rollout_gap_p99": 0.1 + i} if i % 10 == 0 else {})
        for i in range(20)
    ]  # fmt: skip
    after = EVALUATION | {"eval/accuracy": 0.5, "eval/sampled_change": 0.1}
    write(folder / "2_grpo", [EVALUATION, *steps, after])
    environment = {
        "command": "python -m rlbench +exp=sft_grpo_gsm8k resume=/home/a/run seed=3 model.path=/home/a/m.gguf "
        "data.path=/home/a/train.jsonl hydra.run.dir=/home/a/run",
        "processor": "a processor",
        "packages": {"torch": "2", "vllm": "0", "transformers": "5", "peft": "0"},
    }
    (folder / "2_grpo" / "environment.json").write_text(json.dumps(environment))
    (folder / "2_grpo" / "config.yaml").write_text("algorithm:\n  group_size: 8\n")
    return folder


def test_sums_quarters_curve_and_both_evaluations(collector, tmp_path):
    made = collector.collect(made_chain(tmp_path / "a"))

    found = {(r["stage"], r["metric"]): r["value"] for r in made["rows"]}
    assert found["sft", "time of all steps"] == 16.0 and found["grpo", "time of all steps"] == 60.0
    assert found["sft", "training loss, first quarter"] == 7.5 and found["sft", "training loss, last quarter"] == 1.5
    assert found["grpo", "reward, steps 1 to 2"] == pytest.approx(0.025)
    assert found["grpo", "reward, steps 19 to 20"] == pytest.approx(0.925)
    assert found["grpo", "|engine - trainer|, p99, highest check"] == pytest.approx(10.1)
    assert found["grpo", "effective sample size, lowest step"] == pytest.approx(0.81)
    assert found["grpo", "identity checks, all passed"] == 2 and found["grpo", "steps with drift above a limit"] == 2
    assert "warning: Most groups teach nothing: hardly any completion is right" in made["findings"]
    assert found["after sft", "eval/accuracy"] == 0.25 and found["after grpo", "eval/accuracy"] == 0.5
    assert found["after grpo", "eval/sampled_change"] == 0.1 and ("after sft", "eval/sampled_change") not in found


def test_the_command_is_without_a_machines_paths(collector, tmp_path):
    assert collector.collect(made_chain(tmp_path / "a"))["command"] == (
        "python -m rlbench +exp=sft_grpo_gsm8k seed=3 data.path=train.jsonl"
    )
