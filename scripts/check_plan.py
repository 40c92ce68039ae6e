"""Planned against measured peak memory: runs `plan`, then the run itself, for several settings.

    python scripts/check_plan.py --out scripts/results/plan_cpu.json         # three settings of one experiment
    python scripts/check_plan.py --gpu --out scripts/results/plan_h100.json  # twelve of real shapes, random weights

The run's peak is the highest `memory/peak_gib` of its steps (on a CPU the kernel's own count, on a GPU torch's
allocator's), the plan's comes from its probes. The plan holds for completions of full length; where the model ends some
earlier, its line at the tokens that the run's largest update really had is compared, too. --parallel runs several
settings at a time: memory is counted by process, times then mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from random_models import text_of

COMMON = ["tracking.wandb=disabled", "evaluation.num_prompts=0"]
CASES = {
    "64 tokens a completion": ["+exp=grpo_gsm8k", "sampling.max_tokens=64"],
    "96 tokens a completion": ["+exp=grpo_gsm8k", "sampling.max_tokens=96"],
    "32 tokens, microbatches of 1024": [
        "+exp=grpo_gsm8k", "sampling.max_tokens=32", "training.tokens_per_microbatch=1024",
    ],
}  # fmt: skip
_COLUMNS = ["data.prompt_column=prompt", "data.answer_column=chosen"]
_ONLINE = [
    "engine=vllm", "engine.kv_cache_gib=8", "algorithm.prompts_per_step=8", "algorithm.group_size=8",
    "~rewards.components.accuracy", "~rewards.components.format",
    "+rewards.components.share={path:tests.loops.letter_reward.share_of_lowercase}",
    "rewards.allowed_prefixes=[tests.loops.letter_reward]", *_COLUMNS,
    "checks.identity_limit_scale=100", "checks.drift_stop_ess_frac=0", "checks.drift_stop_nats=100",
]  # fmt: skip
_SMALL = ["training.recompute=full", "training.offload=true", "training.tokens_per_microbatch=8192"]
_LARGE = ["training.recompute=mlp", "training.tokens_per_microbatch=8192"]
_LONG = ["training.recompute=full", "training.offload=true", "training.tokens_per_microbatch=16384"]
GPU_CASES: dict[tuple[str, str, str], list[str]] = {  # (shape, quantization, what)
    ("llama-3.1-8b", "nf4", "GRPO, completions of 512"): [
        "+exp=grpo_gsm8k",
        "engine.dense_copies=merged",
        "sampling.max_tokens=512",
        *_SMALL,
    ],
    ("llama-3.1-8b", "nf4", "PPO, completions of 512"): [
        "+exp=ppo_gsm8k",
        "engine.dense_copies=none",
        "algorithm.critic.warmup_steps=0",
        "sampling.max_tokens=512",
        *_SMALL,
    ],
    ("qwen2.5-1.5b", "none", "GRPO, completions of 2,048"): ["+exp=grpo_gsm8k", "sampling.max_tokens=2048", *_LARGE],
    ("qwen2.5-1.5b", "none", "PPO, completions of 512"): [
        "+exp=ppo_gsm8k",
        "algorithm.critic.warmup_steps=0",
        "sampling.max_tokens=512",
        *_LARGE,
    ],
    ("qwen2.5-1.5b", "nf4", "GRPO, completions of 512"): ["+exp=grpo_gsm8k", "sampling.max_tokens=512", *_LARGE],
    ("qwen2.5-1.5b", "fp8", "GRPO, completions of 512"): ["+exp=grpo_gsm8k", "sampling.max_tokens=512", *_LARGE],
    ("llama-3.1-8b", "fp8", "GRPO, completions of 512"): ["+exp=grpo_gsm8k", "sampling.max_tokens=512", *_SMALL],
    ("llama-3.1-8b", "nf4", "DPO, rows of 1,000"): ["+exp=dpo_gsm8k", *_SMALL],
    ("llama-3.1-8b", "nf4", "DPO, rows of 6,000"): ["+exp=dpo_gsm8k", *_LONG],
    ("llama-3.1-8b", "nf4", "DPO, rows of 1,000, no offload"): ["+exp=dpo_gsm8k", *_LARGE],
    ("qwen2.5-1.5b", "none", "SFT, rows of 6,000"): ["+exp=sft_gsm8k", "sft.rows_per_step=8", *_COLUMNS, *_LONG],
    ("qwen2.5-1.5b", "none", "DPO, rows of 1,000"): ["+exp=dpo_gsm8k", *_LARGE],
}
_ROWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name contains one of these, e.g. PPO,fp8")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parts = options.only.split(",")
        cases = gpu_cases(Path(folder), parts) if options.gpu else CASES
        measure({name: overrides for name, overrides in cases.items() if is_wanted(name, parts)}, options)


def is_wanted(case: str, parts: list[str]) -> bool:
    return any(part in case for part in parts)


def measure(cases: dict[str, list[str]], options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []

    def one(case: str) -> None:
        try:
            found = check(case, [*COMMON, f"training.num_steps={options.steps}", *cases[case]])
        except RuntimeError as error:
            print(f"{case}: {error}", flush=True)
            found = [{"case": case, "impl": "run", "error": str(error)[-300:]}]
        print(*found, sep="\n", flush=True)
        rows.extend(found)
        write(options, sorted(rows, key=lambda row: [*cases].index(row["case"])))

    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(one, cases))


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    commit = options.commit or subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()  # fmt: skip
    cpu = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    result = {
        "command": f"python scripts/check_plan.py{' --gpu' * options.gpu} --steps {options.steps} "
        f"--parallel {options.parallel}",
        "device": torch.cuda.get_device_name() if options.gpu else cpu,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit,
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def gpu_cases(folder: Path, parts: list[str]) -> dict[str, list[str]]:
    """Those whose name contains one of `parts`. Models and rows are made; a prompt is 256 tokens."""
    cases = {}
    for (shape, quantization, what), overrides in GPU_CASES.items():
        if not is_wanted(f"{shape}, {quantization}, {what}", parts):
            continue
        model = make_model(shape, quantization)
        online = _ONLINE if "PO, completions" in what else []
        length = 6000 if "6,000" in what else 1000
        file = folder / f"{shape}_{length}.jsonl"
        file.write_text(make_rows(shape, length))
        cases[f"{shape}, {quantization}, {what}"] = [
            *overrides[:1], *online, f"model.path={model}", f"data.path={file}",
            f"model.quantization={quantization}", "data.system_prompt=null", "data.examples=[]", *overrides[1:],
        ]  # fmt: skip
    return cases


def make_model(shape: str, quantization: str) -> str:
    """Its folder; made in a process of its own, which frees the device."""
    code = f"from random_models import random_model; print(random_model({shape!r}, {quantization!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


def make_rows(shape: str, length: int) -> str:
    """JSON lines; prompt and a completion have `length` tokens together."""
    draw = random.Random(0)

    def text(count: int) -> str:
        return text_of(shape, [draw.randrange(1000) for _ in range(count)])

    rows = [{"prompt": text(256)} | {name: text(length - 256) for name in ("chosen", "rejected")} for _ in range(_ROWS)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def check(case: str, overrides: list[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        run(["plan", *overrides, f"hydra.run.dir={folder}/plan"])
        planned = json.loads((Path(folder) / "plan" / "plan.json").read_text())["plan"]
        run([*overrides, f"hydra.run.dir={folder}/run"])
        record = Path(folder) / "run" / "plan.json"
        formula = json.loads(record.read_text())["plan"] if record.is_file() else None
        steps = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    if not any("training/num_tokens" in step for step in steps):
        raise RuntimeError("no step of the run had an update")
    slowest = {name: max(step.get(f"time/{name}_s", 0.0) for step in steps) for name in planned["time_s"]}
    measured = max(step["memory/peak_gib"] for step in steps)
    tokens = max(step["training/num_tokens"] / step["training/num_microbatches"] for step in steps
                 if "training/num_tokens" in step)  # fmt: skip
    peaks = {"plan": (planned["peak_gib"], _at(planned, tokens))}
    if formula is not None:
        peaks["formula in the run's folder"] = (formula["peak_gib"], _at(formula, tokens))
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
    """
    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    done = subprocess.run([sys.executable, "-m", "rlbench", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")


def row(case: str, impl: str, metric: str, value: float, unit: str) -> dict[str, Any]:
    return {"case": case, "impl": impl, "metric": metric, "value": round(value, 4), "unit": unit}


if __name__ == "__main__":
    main()
