"""What checkpoints cost: the share of a real run's time that they take at the default interval.

    python scripts/bench_checkpoint.py --out scripts/results/checkpoint_cpu.json [--steps 31] [OVERRIDES]

The run is +exp=grpo_gsm8k with its own defaults, SmolLM2-135M-Instruct on a CPU, without evaluations. Every call that
saves is timed in the run's process, from the collection of the state to the last fsync. The checkpoint at the end is
written whatever the interval, so it is reported apart.
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
from statistics import median
from typing import Any

import torch

PROGRAM = """
import json, sys, time
from rlbench.loops.training_loop import TrainingLoop
real_run, real_save, saves = TrainingLoop.run, TrainingLoop.save, []
def save(loop):
    start = time.monotonic()
    real_save(loop)
    saves.append({"step": loop.step, "seconds": time.monotonic() - start})
def run(loop):
    start = time.monotonic()
    real_run(loop)
    found = {"seconds": time.monotonic() - start, "saves": saves, "model": loop.inputs.model.name}
    (loop.run_folder / "saves.json").write_text(json.dumps(found))
TrainingLoop.run, TrainingLoop.save = run, save
from rlbench.__main__ import main
sys.argv = ["rlbench", *sys.argv[1:]]
main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=31)
    options, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = ["tracking.wandb=disabled", "evaluation.num_prompts=0", f"training.num_steps={options.steps}"]
        arguments = ["+exp=grpo_gsm8k", *settings, *overrides, f"hydra.run.dir={folder}/run"]
        subprocess.run([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.DEVNULL, check=True)
        run = Path(folder) / "run"
        found = json.loads((run / "saves.json").read_text())
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        newest = max((run / "checkpoints").glob("step-*"))
        num_bytes = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    result = {
        "command": " ".join(["python scripts/bench_checkpoint.py", f"--steps {options.steps}", *overrides]),
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit.stdout.strip(),
        "rows": rows(found, [step["time/step_s"] for step in steps], num_bytes),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["rows"], indent=1))


def rows(found: dict[str, Any], step_s: list[float], num_bytes: int) -> list[dict[str, Any]]:
    inside = [save["seconds"] for save in found["saves"][:-1]]
    last = found["saves"][-1]["seconds"]
    numbers = [
        ("steps", len(step_s), ""),
        ("step, median", median(step_s), "s"),
        ("checkpoints at the default interval", len(inside), ""),
        ("steps at which they were written", [save["step"] for save in found["saves"][:-1]], ""),
        ("checkpoint, median", median(inside), "s"),
        ("checkpoint", num_bytes / 2**20, "MiB"),
        ("checkpoints / time of the steps", sum(inside) / sum(step_s), "share"),
        ("with the one at the end / whole run", (sum(inside) + last) / found["seconds"], "share"),
    ]
    return [
        {
            "case": found["model"],
            "impl": "rlbench",
            "metric": metric,
            "value": round(value, 5) if isinstance(value, float) else value,
            "unit": unit,
        }
        for metric, value, unit in numbers
    ]


if __name__ == "__main__":
    main()
