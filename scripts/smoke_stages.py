"""A few steps of every kind of stage on the device that is there, each in a process of its own with a time limit.

    python scripts/smoke_stages.py [--model FOLDER_OR_GGUF] [--parallel 4] [--engine hf] [--out FILE] [KEY=VALUE ...]

Without --model: a tiny one with random weights. The reward is the share of lowercase letters, which differs within a
group for any model. Those of `vllm` run where it can be imported, and alone: they ask for a share of the free memory.
Exit status 1 if a stage failed or made no update. KEY=VALUE are settings for every stage.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(
        [*map(str, (ROOT, ROOT / "kernels", ROOT / "rewards")), os.environ.get("PYTHONPATH", "")]
    ),
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "COLUMNS": "160",
}
ONLINE = [
    "~rewards.components.accuracy", "~rewards.components.format",
    "+rewards.components.share={path:tests.loops.letter_reward.share_of_lowercase}",
    "rewards.allowed_prefixes=[tests.loops.letter_reward]", "rewards.num_workers=1", "sampling.max_tokens=16",
    "algorithm.prompts_per_step=4", "algorithm.group_size=4", "evaluation.num_prompts=0", "engine.max_num_seqs=16",
]  # fmt: skip
SMALL_VLLM = ["engine=vllm", "engine.kv_cache_gib=0.5"]
TRUNCATED = [
    "sampling.top_p=0.95", "sampling.top_k=50", "sampling.min_p=0.01", "sampling.repetition_penalty=1.05",
    "sampling.presence_penalty=0.1",
]  # fmt: skip
OFFLINE = ["evaluation.num_prompts=4"]
WAIT_S = 0.05
NO_VLLM = "no vllm"


@dataclass(frozen=True, slots=True)
class Stage:
    """`{run}` in an override is the folder of the stage that it comes after."""

    experiment: str
    overrides: list[str]
    is_online: bool = True
    after: str = ""
    engine: str = ""  # "": that of the command line


STAGES = {
    "grpo_vllm": Stage("grpo_gsm8k", [], engine="vllm"),
    "grpo_vllm_truncated": Stage("grpo_gsm8k", TRUNCATED, engine="vllm"),
    "grpo_vllm_full": Stage("grpo_full_gsm8k", [], engine="vllm"),
    "sft": Stage("sft_gsm8k", [*OFFLINE, "sft.rows_per_step=4"], is_online=False),
    "reward_model": Stage("reward_model_gsm8k", [*OFFLINE, "reward_model.pairs_per_step=4"], is_online=False),
    "grpo_hf": Stage("grpo_gsm8k", [], engine="hf"),
    "grpo_muon": Stage("grpo_gsm8k", ["optim=muon"]),
    "grpo_adamw_8bit": Stage("grpo_gsm8k", ["optim=adamw_8bit"]),
    "grpo_full": Stage("grpo_full_gsm8k", []),
    "sft_full_galore": Stage(
        "sft_full_gsm8k", [*OFFLINE, "sft.rows_per_step=4", "optim=galore", "optim.galore.rank=32"], is_online=False
    ),
    "sft_full_galore_8bit": Stage(
        "sft_full_gsm8k",
        [*OFFLINE, "sft.rows_per_step=4", "optim=galore_8bit", "optim.galore.rank=32"],
        is_online=False,
    ),
    "ppo": Stage("ppo_gsm8k", ["algorithm.critic.warmup_steps=0"]),
    "online_dpo": Stage("online_dpo_gsm8k", []),
    "dpo": Stage("dpo_gsm8k", [*OFFLINE, "preference.pairs_per_step=4"], is_online=False),
    "kto": Stage("kto_gsm8k", [*OFFLINE, "preference.pairs_per_step=4"], is_online=False),
    "distillation": Stage("distillation_gsm8k", ["algorithm.teacher.adapter={run}"], after="sft"),
    "grpo_reward_model": Stage(
        "grpo_gsm8k",
        ["+rewards.components.preference={{path:reward_model,kwargs:{{run:{run}}}}}", "algorithm.kl_coef=0.02"],
        after="reward_model",
    ),
}


@dataclass(slots=True, kw_only=True)
class Outcome:
    stage: str
    status: str  # exit status, or why there is none
    seconds: float = 0.0
    num_steps: int = 0
    num_updates: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    first_reward: float | None = None
    last_reward: float | None = None
    peak_mib: float | None = None
    command: list[str] = field(default_factory=list)
    log_tail: list[str] = field(default_factory=list)  # of a stage that failed

    @property
    def is_good(self) -> bool:
        return self.status == "0" and self.num_updates > 0


@dataclass(slots=True)
class Running:
    process: subprocess.Popen[bytes]
    arguments: list[str]
    began: float

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def kill(self) -> None:
        """With all that it started, which is in its session."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def main() -> None:
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"runs and logs: {options.folder}", flush=True)
    began = time.monotonic()
    outcomes = run_all(options, shared_settings(options))
    print(table(outcomes))
    environments = sorted(options.folder.glob("*/run/environment.json"))
    result = {
        "command": " ".join(["python", "scripts/smoke_stages.py", *sys.argv[1:]]),
        "environment": json.loads(environments[0].read_text()) if environments else None,
        "wall_s": round(time.monotonic() - began, 1),
        "rows": [asdict(outcome) for outcome in outcomes],
    }
    out = options.out or options.folder / "smoke.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['wall_s']:.0f} s; written to {out}")
    sys.exit(any(not outcome.is_good for outcome in outcomes if outcome.status != NO_VLLM))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers folder or a .gguf file")
    parser.add_argument("--parallel", type=int, default=1, help="processes at a time")
    parser.add_argument("--engine", default="hf", choices=["hf", "vllm"], help="of the stages whose name has none")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=300.0, help="of a stage")
    parser.add_argument("--stages", default=",".join(STAGES), help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="of runs and logs; default: a temporary one, which stays")
    parser.add_argument("--out", type=Path, help="the JSON; default: smoke.json in the folder")
    options, overrides = parser.parse_known_args()
    unknown = [override for override in overrides if override.startswith("-") or "=" not in override]
    if unknown:
        parser.error(f"got {' '.join(unknown)}, expected settings as KEY=VALUE")
    options.stages = options.stages.split(",")
    if not set(options.stages) <= set(STAGES):
        parser.error(f"--stages is {','.join(options.stages)}, expected some of {','.join(STAGES)}")
    missing = [s for s in options.stages if STAGES[s].after and STAGES[s].after not in options.stages]
    if missing:
        parser.error(f"--stages has {missing[0]}, which needs {STAGES[missing[0]].after} before it")
    options.overrides = overrides
    options.folder = (options.folder or Path(tempfile.mkdtemp(prefix="rlbench-smoke-"))).resolve()
    if options.folder.is_dir() and any(options.folder.iterdir()):
        parser.error(f"--folder is {options.folder}, expected an empty or a new one")
    if options.model and Path(options.model).exists():
        options.model = str(Path(options.model).resolve())
    return options


def shared_settings(options: argparse.Namespace) -> list[str]:
    """Model and rows of every stage."""
    rows = [{"question": f"{a}+{b}", "answer": f"{a} + {b} is {a + b}"} for a in range(8) for b in range(5)]
    file = options.folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, dtype = options.model, []
    if model is None:
        model, dtype = options.folder / "model", ["model.dtype=float32"]
        make = f"from tests.tiny import save_tiny_model; save_tiny_model({str(model)!r}, head_dim=32)"
        subprocess.run([sys.executable, "-c", make], env=ENVIRONMENT, check=True)
    elif str(model).endswith(".gguf"):  # converted once, not by each stage
        convert = f"from rlbench.models.source import *; resolve_model(ModelConfig(path={str(model)!r}))"
        subprocess.run([sys.executable, "-c", convert], env=ENVIRONMENT, check=True)
    return [
        f"model.path={model}", *dtype, f"data.path={file}", "data.system_prompt=null", "data.examples=[]",
        "tracking=local", f"training.num_steps={options.steps}", "optim.lr=1e-3", "optim.warmup_steps=0",
    ]  # fmt: skip


def run_all(options: argparse.Namespace, shared: list[str]) -> list[Outcome]:
    """In the order of the table; a stage waits for a free slot and for the one that it comes after."""
    waiting = [name for name in STAGES if name in options.stages]
    running: dict[str, Running] = {}
    done: dict[str, Outcome] = {}
    try:
        while waiting or running:
            for name in [n for n in waiting if not STAGES[n].after or STAGES[n].after in done]:
                problem = why_not(name, done, options)
                if problem:
                    done[name] = Outcome(stage=name, status=problem)
                elif has_slot(name, running, options):
                    running[name] = start(name, options, shared)
                else:
                    continue
                waiting.remove(name)
            time.sleep(WAIT_S)
            for name, run in list(running.items()):
                if (outcome := finished(name, run, options)) is not None:
                    done[name] = outcome
                    del running[name]
                    print(f"{name}: {outcome.status} after {outcome.seconds:.0f} s", flush=True)
    finally:
        for run in running.values():
            run.kill()
    return [done[name] for name in STAGES if name in done]


def engine_of(name: str, options: argparse.Namespace) -> str:
    return STAGES[name].engine or options.engine if STAGES[name].is_online else ""


def why_not(name: str, done: dict[str, Outcome], options: argparse.Namespace) -> str:
    before = STAGES[name].after
    if before and not done[before].is_good:
        return f"needs {before}"
    needs_vllm = engine_of(name, options) == "vllm"
    return NO_VLLM if needs_vllm and importlib.util.find_spec("vllm") is None else ""


def has_slot(name: str, running: dict[str, Running], options: argparse.Namespace) -> bool:
    engines = {engine_of(other, options) for other in running}
    if "vllm" in engines or (engine_of(name, options) == "vllm" and running):
        return False
    return len(running) < options.parallel


def start(name: str, options: argparse.Namespace, shared: list[str]) -> Running:
    stage, place = STAGES[name], options.folder / name
    place.mkdir(exist_ok=True)
    engine = engine_of(name, options)
    before = options.folder / stage.after / "run"
    arguments = [
        f"+exp={stage.experiment}",
        *shared,
        *(ONLINE if stage.is_online else []),
        *(SMALL_VLLM if engine == "vllm" else [f"engine={engine}"] if engine else []),
        *(override.format(run=before) if stage.after else override for override in stage.overrides),
        *options.overrides,
        f"hydra.run.dir={place / 'run'}",
    ]
    with (place / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlbench", *arguments],
            cwd=place, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    return Running(process, arguments, time.monotonic())


def finished(name: str, run: Running, options: argparse.Namespace) -> Outcome | None:
    """None: it goes on."""
    status = run.process.poll()
    if status is None and run.seconds() < options.limit_s:
        return None
    if status is None:
        run.kill()
    place = options.folder / name
    outcome = Outcome(
        stage=name, status="time limit" if status is None else str(status), seconds=round(run.seconds(), 1),
        command=["python", "-m", "rlbench", *run.arguments], **measured(place / "run" / "metrics.jsonl"),
    )  # fmt: skip
    if not outcome.is_good:
        outcome.log_tail = (place / "log.txt").read_text(errors="replace").splitlines()[-40:]
    return outcome


def measured(file: Path) -> dict[str, Any]:
    """What the steps in a run's metrics say."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    steps = [line for line in lines if line["phase"] == "train"]
    losses, rewards, peaks = (
        [step[key] for step in steps if step.get(key) is not None]
        for key in ("loss/total", "reward/mean", "memory/peak_gib")
    )
    return {
        "num_steps": len(steps),
        "num_updates": int(steps[-1]["policy_version"]) if steps else 0,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "first_reward": rewards[0] if rewards else None,
        "last_reward": rewards[-1] if rewards else None,
        "peak_mib": round(max(peaks) * 1024, 1) if peaks else None,
    }


def table(outcomes: list[Outcome]) -> str:
    head = ["stage", "status", "s", "steps", "updates", "loss", "reward", "peak MiB"]
    rows = [head, *([
        o.stage, o.status, f"{o.seconds:.0f}", str(o.num_steps), str(o.num_updates),
        _change(o.first_loss, o.last_loss), _change(o.first_reward, o.last_reward),
        "-" if o.peak_mib is None else f"{o.peak_mib:.0f}",
    ] for o in outcomes)]  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    tails = [f"\n{o.stage}:\n" + "\n".join(o.log_tail[-15:]) for o in outcomes if o.log_tail]
    return "\n".join([*lines, *tails])


def _change(first: float | None, last: float | None) -> str:
    return "-" if first is None or last is None else f"{first:.4f} -> {last:.4f}"


if __name__ == "__main__":
    main()
