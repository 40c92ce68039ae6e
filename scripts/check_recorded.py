"""Recorded against repeated: 50 random rollouts of a finished run sampled again, over 1,000 scored again.

    python scripts/check_recorded.py --out scripts/results/recorded_cpu.json [OVERRIDES]

The run is +exp=grpo_gsm8k, SmolLM2-135M-Instruct on a CPU, with every policy kept so that any rollout can be replayed.
Exit status 1 if one rollout differs, or one reward, in any bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from rlbench.commands.rescore import Comparison, compare, rollout_files
from rlbench.config.recorded import recorded_config

NUM_STEPS = 8
RUN = [
    "+exp=grpo_gsm8k", "tracking.wandb=disabled", "evaluation.num_prompts=0", f"training.num_steps={NUM_STEPS}",
    "checkpoint.every_steps=1", f"checkpoint.keep_last={NUM_STEPS}", "algorithm.prompts_per_step=16",
    "sampling.max_tokens=16", "data.examples=[]", "optim.lr=3e-4",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=50)
    options, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        call([*RUN, *overrides, f"hydra.run.dir={run}"])
        config = (Path(run) / "config.yaml").read_text()
        replayed = call(["replay", run, "--count", str(options.count)], may_fail=True)
        rescored = compare(recorded_config(Path(run), []), rollout_files(Path(run)))
    found = numbers(replayed, rescored)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    dtype = re.search(r"dtype: (\w+)", config)
    result = {
        "command": " ".join(["python scripts/check_recorded.py", f"--count {options.count}", *overrides]),
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit.stdout.strip(),
        "rows": [
            {"case": f"SmolLM2-135M-Instruct, {dtype[1] if dtype else '?'}", "impl": "rlbench", "metric": metric,
             "value": value, "unit": "rollouts"}
            for metric, value in found.items()
        ],
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["rows"], indent=1))
    is_same = found["replayed"] == found["replayed, identical"] and not found["rescored, reward changed"]
    sys.exit(0 if is_same else 1)


def numbers(replayed: str, found: Comparison) -> dict[str, int]:
    same = re.search(r"(\d+) of (\d+) rollouts are identical", replayed)
    if same is None:
        sys.exit(f"replay gave no verdict:\n{replayed[-2000:]}")
    return {
        "replayed": int(same[2]),
        "replayed, identical": int(same[1]),
        "rescored": len(found.rewards),
        "rescored, reward changed": sum(before != after for _, _, (before, after) in found.rewards),
        "rescored, a component changed": sum(a != b for pairs in found.components.values() for a, b in pairs),
        "rescored, advantage changed": sum(before != after for before, after in found.advantages),
        "rescored, no verdict": sum(found.failures.values()),
    }


def call(arguments: list[str], *, may_fail: bool = False) -> str:
    environment = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-m", "rlbench", *arguments], capture_output=True, text=True, env=environment
    )
    if done.returncode and not may_fail:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    return done.stdout


if __name__ == "__main__":
    main()
