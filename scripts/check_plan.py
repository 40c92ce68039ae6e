"""Planned against measured peak memory: runs `plan`, then the run itself, for several settings of one experiment.

    python scripts/check_plan.py --out scripts/results/plan_cpu.json

The run's peak is the kernel's own count for its process (ru_maxrss of wait4), the plan's comes from its probes.
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
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case, overrides in CASES.items():
        rows += check(case, [*COMMON, f"training.num_steps={options.steps}", *overrides])
        print(rows[-1], flush=True)
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
        measured_gib = run([*overrides, f"hydra.run.dir={folder}/run"]) / GIB
        steps = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    slowest = {name: max(step.get(f"time/{name}_s", 0.0) for step in steps) for name in ("generation", "update")}
    return [
        row(case, "plan", "peak", planned["peak_gib"], "GiB"),
        row(case, "run", "peak", measured_gib, "GiB"),
        *(row(case, "plan", f"{name}, at most", planned["time_s"][name], "s") for name in slowest),
        *(row(case, "run", f"{name}, slowest step", seconds, "s") for name, seconds in slowest.items()),
        row(case, "plan", "peak / run's peak - 1", planned["peak_gib"] / measured_gib - 1, "share"),
    ]


def run(arguments: list[str]) -> int:
    """Peak resident bytes of `python -m rlbench ...`."""
    process = subprocess.Popen([sys.executable, "-m", "rlbench", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"rlbench {' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}")
    return 1024 * usage.ru_maxrss


def row(case: str, impl: str, metric: str, value: float, unit: str) -> dict[str, Any]:
    return {"case": case, "impl": impl, "metric": metric, "value": round(value, 4), "unit": unit}


if __name__ == "__main__":
    main()
