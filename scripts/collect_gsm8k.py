"""Numbers of learning runs on GSM8K, from the folders that `+exp=sft_grpo_gsm8k` left.

    python scripts/collect_gsm8k.py FOLDER.. [--base FOLDER] [--note TEXT ..] --output scripts/results/gsm8k_h200.json

Each folder is a chain's, with 1_sft and 2_grpo inside: one seed. --base is a run of stage=rl from the untrained model,
whose first evaluation counts. Accuracies come with their 95% intervals; `eval/sampled_change` is the difference by
problem between the evaluations before and after GRPO. Times are sums over steps: starts and evaluations are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import yaml

from rlbench.checks.health import find_problems

_PARTS = 10  # of the training curve
Row = dict[str, Any]


def read(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def row(stage: str, metric: str, value: float, unit: str) -> Row:
    return {"stage": stage, "metric": metric, "value": float(f"{value:.5g}"), "unit": unit}


def evaluation(stage: str, line: Row) -> list[Row]:
    found = {k: v for k, v in line.items() if k.startswith("eval/") and k not in ("eval/num", "eval/reward")}
    return [row(stage, k, v, "tokens" if "length" in k else "share") for k, v in found.items()]


def evaluations(lines: list[Row]) -> list[Row]:
    return [line for line in lines if line.get("phase") == "eval" and "eval/accuracy" in line]


def supervised(lines: list[Row]) -> list[Row]:
    steps = [line for line in lines if line.get("phase") == "train"]
    quarter = len(steps) // 4
    loss = "loss/total"
    return [
        row("sft", "steps", len(steps), "steps"),
        row("sft", "time of all steps", sum(s["time/step_s"] for s in steps), "s"),
        row("sft", "training loss, first quarter", statistics.fmean(s[loss] for s in steps[:quarter]), "nats a token"),
        row("sft", "training loss, last quarter", statistics.fmean(s[loss] for s in steps[-quarter:]), "nats a token"),
    ]


def online(lines: list[Row]) -> list[Row]:
    steps = [line for line in lines if line.get("phase") == "train"]

    def mean(key: str, part: list[Row]) -> float:
        return statistics.fmean(step[key] for step in part)

    checks = [step for step in steps if "identity/rollout_gap_mean" in step]
    part = max(1, len(steps) // _PARTS)
    rows = [
        row("grpo", "steps", len(steps), "steps"),
        row("grpo", "time of all steps", sum(step["time/step_s"] for step in steps), "s"),
        row("grpo", "step, median", statistics.median(step["time/step_s"] for step in steps), "s"),
        row("grpo", "|engine - trainer|, mean over checks", mean("identity/rollout_gap_mean", checks), "nats"),
        row("grpo", "|engine - trainer|, p99, highest check",
            max(step["identity/rollout_gap_p99"] for step in checks), "nats"),
        row("grpo", "identity checks, all passed", len(checks), "checks"),
        row("grpo", "steps with drift above a limit", sum(step["drift/level"] > 0 for step in steps), "steps"),
        row("grpo", "effective sample size, lowest step", min(step["drift/ess_frac"] for step in steps), "share"),
        row("grpo", "memory, highest step", max(step["memory/peak_gib"] for step in steps), "GiB"),
    ]  # fmt: skip
    for start in range(0, len(steps) - part + 1, part):
        span = f"steps {start + 1} to {start + part}"
        rows.append(row("grpo", f"reward, {span}", mean("reward/mean", steps[start : start + part]), "share"))
        rows.append(row("grpo", f"groups without signal, {span}",
                        mean("groups/no_signal_frac", steps[start : start + part]), "share"))  # fmt: skip
    return rows


def collect(folder: Path) -> Row:
    after_sft, *_, after_grpo = evaluations(read(folder / "2_grpo"))
    environment = json.loads((folder / "2_grpo" / "environment.json").read_text())
    rows = supervised(read(folder / "1_sft")) + online(read(folder / "2_grpo"))
    rows += evaluation("after sft", after_sft) + evaluation("after grpo", after_grpo)
    return {"command": clean(environment["command"]), "rows": rows, "findings": findings(folder / "2_grpo")}


def findings(folder: Path) -> list[str]:
    """Of the health rules, at the end of the run."""
    lines = read(folder)
    train = [line for line in lines if line.get("phase") == "train"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return [f"{found.severity}: {found.title}" for found in find_problems(train, evaluations(lines), config)]


def clean(command: str) -> str:
    """Without where this machine keeps its files, and whether the run was resumed."""
    command = re.sub(r"\s(hydra\.run\.dir|resume|model\.path|tracking\.wandb)=\S+", "", command)
    return re.sub(r"(path=)\S*/", r"\1", command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--note", action="append", default=[])
    parser.add_argument("--commit", default="")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    environment = json.loads((options.folders[0] / "2_grpo" / "environment.json").read_text())
    packages = environment["packages"]
    result: Row = {
        "device": environment.get("gpu", environment["processor"]),
        "versions": {name: packages[name] for name in ("torch", "vllm", "transformers", "peft")},
        "commit": options.commit,
        "notes": options.note,
        "runs": [collect(folder) for folder in options.folders],
    }
    if options.base:
        (first, *_) = evaluations(read(options.base))
        result["untrained"] = evaluation("untrained", first)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    for run in [*result["runs"], {"command": "untrained", "rows": result.get("untrained", [])}]:
        print(run["command"])
        print(*(f"  {r['stage']}: {r['metric']}: {r['value']} {r['unit']}" for r in run["rows"]), sep="\n")


if __name__ == "__main__":
    main()
