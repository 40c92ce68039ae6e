"""A run killed with signal 9 at random moments of random steps and resumed each time, against the same run left alone.

    python scripts/soak_kills.py [--kills 20] [--steps 30] [--seed 0]

Adapter, metrics (times left out) and rollouts must be identical. A tiny model with random weights, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rlbench.training.checkpoint import find_checkpoint  # noqa: E402
from tests.loops.conftest import ENVIRONMENT  # noqa: E402
from tests.loops.test_rl_runs import comparable, sampled  # noqa: E402
from tests.tiny import save_tiny_model  # noqa: E402


def overrides(folder: Path, num_steps: int) -> list[str]:
    """A run that pays for the letter `a`."""
    rows = [{"question": f"{a}+{b}", "answer": str(a + b)} for a in range(8) for b in range(5)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tiny_model(folder / "model")
    return [
        "name=soak", f"model.path={folder / 'model'}", "model.dtype=float32", f"data.path={folder / 'rows.jsonl'}",
        "data.system_prompt=null", "data.examples=[]", "~rewards.components.accuracy", "~rewards.components.format",
        "+rewards.components.share={path:tests.loops.letter_reward.share_of_a}",
        "rewards.allowed_prefixes=[tests.loops.letter_reward]", "sampling.max_tokens=12",
        "algorithm.prompts_per_step=4", "algorithm.group_size=8", "evaluation.num_prompts=8",
        "evaluation.every_steps=7", "optim.lr=0.02", "checkpoint.every_steps=2", f"training.num_steps={num_steps}",
    ]  # fmt: skip


def start(arguments: list[str], folder: Path) -> subprocess.Popen:
    log = (folder / "log.txt").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", "rlbench", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def num_done(run: Path) -> int:
    """Steps in the metrics so far."""
    file = run / "metrics.jsonl"
    return file.read_text().count('"phase": "train"') if file.exists() else 0


def touched(run: Path, since: float) -> bool:
    """Whether this process has recorded a step."""
    file = run / "metrics.jsonl"
    return file.exists() and file.stat().st_mtime > since


def kill_at(arguments: list[str], folder: Path, num_steps: int, after_s: float) -> bool:
    """Start or resume, wait for that many steps and a moment, kill; False: the run had ended before."""
    has_checkpoint = any((folder / "run" / "checkpoints").glob("step-*"))  # a first one may have been cut: it is absent
    process = start([*arguments, f"resume={folder / 'run'}"] if has_checkpoint else arguments, folder)
    began = time.time()
    while process.poll() is None and not (num_done(folder / "run") >= num_steps and touched(folder / "run", began)):
        time.sleep(0.002)
    time.sleep(after_s)
    if process.poll() is not None:
        if process.returncode:
            sys.exit(f"the run ended with status {process.returncode}:\n{(folder / 'log.txt').read_text()[-3000:]}")
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        alone, killed = Path(place) / "alone", Path(place) / "killed"
        for folder in (alone, killed):
            folder.mkdir()
        arguments = [*overrides(Path(place), options.steps), "hydra.run.dir=run"]
        began = time.monotonic()
        if start(arguments, alone).wait():
            sys.exit((alone / "log.txt").read_text()[-3000:])
        print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
        kills = 0
        for number in sorted(draw.choices(range(options.steps - 1), k=options.kills)):
            kills += kill_at(arguments, killed, number, draw.uniform(0.0, 0.08))
            print(f"kill {kills}: {num_done(killed / 'run')} of {options.steps} steps in the metrics", flush=True)
        if start([*arguments, f"resume={killed / 'run'}"], killed).wait():
            sys.exit((killed / "log.txt").read_text()[-3000:])
        runs = [folder / "run" for folder in (alone, killed)]
        fingerprints = [find_checkpoint(run)[0].state["adapter_fingerprint"] for run in runs]
        found = {
            "adapter": fingerprints[0] == fingerprints[1],
            "metrics": comparable(runs[0]) == comparable(runs[1]),
            "rollouts": sampled(runs[0]) == sampled(runs[1]),
        }
        print(f"{kills} kills in {options.steps} steps; identical: {found}")
        if not all(found.values()) or kills < options.kills:
            sys.exit(1)


if __name__ == "__main__":
    main()
