"""Whole runs in processes of their own, on the tiny model."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loops.forked import ForkedProcess, ForkServer

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "rewards"))),
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "COLUMNS": "160",
}
SERVER = ForkServer(ENVIRONMENT)


@pytest.fixture(scope="session", autouse=True)
def end_of_the_fork_server() -> Iterator[None]:
    yield
    SERVER.close()


def run(*overrides: str, folder: Path, program: str = "") -> subprocess.CompletedProcess:
    """`python -m rlbench overrides` in `folder`, or `python -c program overrides`, without the time of its imports."""
    process = SERVER.start([*overrides], folder, program=program)
    out, errors = process.communicate(timeout=200)
    return subprocess.CompletedProcess([*overrides], process.wait(0), out, errors)


def run_afresh(*overrides: str, folder: Path) -> subprocess.CompletedProcess:
    """The same in a new interpreter: each command and each stage has a test that does this."""
    return subprocess.run(
        [sys.executable, "-m", "rlbench", *overrides], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip


def start(*overrides: str, folder: Path) -> ForkedProcess:
    """`run` that goes on, with its errors among its output."""
    return SERVER.start([*overrides], folder, are_merged=True)


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
