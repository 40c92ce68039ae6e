"""Planned against measured peak memory: runs `plan`, then the run itself, for several settings of one experiment.

    python scripts/check_plan.py --out scripts/results/plan_cpu.json

The run's peak is the highest `memory/peak_gib` of its steps (the kernel's own count), the plan's comes from its probes.
The plan holds for completions of full length; where the model ends some earlier, its line at the tokens that the
run's largest update really had is compared, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
COMMON = ["+exp=grpo_gsm8k", "tracking.wandb=disabled", "evaluation.num_prompts=0"]
CASES = {
    "64 tokens a completion": ["sampling.max_tokens=64"],
    "96 tokens a completion": ["sampling.max_tokens=96"],
    "32 tokens, microbatches of 1024": ["sampling.max_tokens=32", "training.tokens_per_microbatch=1024"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case, overrides in CASES.items():
        rows += check(case, [*COMMON, f"training.num_steps={options.steps}", *overrides])
        print(*(line for line in rows if line["case"] == case), sep="\n", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    result = {
        "command": f"python scripts/check_plan.py --steps {options.steps}",
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit.stdout.strip(),
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def check(case: str, overrides: list[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        run(["plan", *overrides, f"hydra.run.dir={folder}/plan"])
        planned = json.loads((Path(folder) / "plan" / "plan.json").read_text())["plan"]
        run([*overrides, f"hydra.run.dir={folder}/run"])
        formula = json.loads((Path(folder) / "run" / "plan.json").read_text())["plan"]
        steps = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    slowest = {name: max(step.get(f"time/{name}_s", 0.0) for step in steps) for name in ("generation", "update")}
    measured = max(step["memory/peak_gib"] for step in steps)
    tokens = max(step["training/num_tokens"] / step["training/num_microbatches"] for step in steps)
    peaks = {
        "plan": (planned["peak_gib"], _at(planned, tokens)),
        "formula in the run's folder": (formula["peak_gib"], _at(formula, tokens)),
    }
    return [
        row(case, "run", "peak", measured, "GiB"),
        row(case, "run", "packed tokens of an update, largest mean", tokens, "tokens"),
        *(row(case, impl, "peak, at most", most, "GiB") for impl, (most, _) in peaks.items()),
        *(row(case, impl, "peak at the run's tokens", at, "GiB") for impl, (_, at) in peaks.items()),
        *(row(case, impl, "at most / run - 1", most / measured - 1, "share") for impl, (most, _) in peaks.items()),
        *(row(case, impl, "at the run's tokens / run - 1", at / measured - 1, "share")
          for impl, (_, at) in peaks.items()),
        *(row(case, "plan", f"{name}, at most", planned["time_s"][name], "s") for name in slowest),
        *(row(case, "run", f"{name}, slowest step", seconds, "s") for name, seconds in slowest.items()),
    ]  # fmt: skip


def _at(plan: dict[str, Any], num_tokens: float) -> float:
    """Peak of the phases, with an update of `num_tokens`."""
    line = plan["update_gib"]
    return max(plan["generation_peak_gib"], line["fixed"] + line["slope"] * num_tokens)


def run(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "rlbench", *arguments], stdout=subprocess.DEVNULL, check=True)


def row(case: str, impl: str, metric: str, value: float, unit: str) -> dict[str, Any]:
    return {"case": case, "impl": impl, "metric": metric, "value": round(value, 4), "unit": unit}


if __name__ == "__main__":
    main()
