"""Whole runs in processes of their own, on the tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "rewards"))),
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "COLUMNS": "160",
}


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "rlbench", *overrides]


def run(*overrides: str, folder: Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*overrides), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, **options
    )


@pytest.fixture(scope="session")
def tiny_overrides(tiny_folder, tmp_path_factory) -> list[str]:
    """A run on the tiny model that pays for the letter `a`."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"question": f"{a}+{b}", "answer": str(a + b)} for a in range(8) for b in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = "path:tests.loops.letter_reward"
    return [
        "name=tiny",
        f"model.path={tiny_folder}",
        "hardware.num_threads=1",  # the model is tiny
        "model.dtype=float32",
        f"data.path={data}",
        "data.system_prompt=null",
        "data.examples=[]",
        "~rewards.components.accuracy",
        "~rewards.components.format",
        f"+rewards.components.share={{{reward}.share_of_a}}",
        f"+rewards.components.accuracy={{{reward}.accuracy,weight:0.0}}",
        "rewards.allowed_prefixes=[tests.loops.letter_reward]",
        "sampling.max_tokens=12",
        "algorithm.prompts_per_step=4",
        "algorithm.group_size=8",
        "evaluation.num_prompts=8",
        "optim.lr=0.02",
        "optim.warmup_steps=0",
    ]
