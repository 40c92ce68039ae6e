"""Bytes of an optimizer's state by optim.name, after one update with random gradients, beside what `plan` counts.

    python scripts/measure_optimizer_state.py --out scripts/results/optimizer_state_cpu.json
    python scripts/measure_optimizer_state.py --out scripts/results/optimizer_state_GPU.json --device cuda  # paged too

A float32 model of SmolLM2-135M's shape with random weights: all of them trained, and an adapter of rank 16, which
GaLore cannot project. Each optimizer has a process of its own. `state` is all that it keeps, GaLore's stand-ins with
it; `counted` leaves out the counts of steps and the scales of 8 bits.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlbench.config.optim import OPTIMIZERS

SHAPE: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
CASES = ("all weights", "adapter of rank 16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "NAME"))
    options = parser.parse_args()
    if options.worker:
        case, name = options.worker
        print(json.dumps(measure(case, name, options.device)))
        return
    if options.out is None:
        parser.error("--out FILE is needed")
    rows = []
    for case in CASES:
        for name in OPTIMIZERS:
            is_left_out = (name.startswith("galore") and case != CASES[0]) or (
                name.startswith("paged") and options.device == "cpu"
            )
            if not is_left_out:
                rows += measured_rows(case, name, options.device)
    options.out.write_text(json.dumps(result(rows, options.device), indent=1) + "\n")


def measured_rows(case: str, name: str, device: str) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--device", device, "--worker", case, name]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(case, name, found, flush=True)
    case = f"SmolLM2-135M's shape, {case}"
    return [
        {"case": case, "impl": f"optim={name}", "metric": metric, "value": round(num_bytes / 1e6, 3), "unit": "MB"}
        for metric, num_bytes in found.items()
    ]


def measure(case: str, name: str, device: str) -> dict[str, int]:
    """Bytes by metric."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlbench.config.schema import LoraConfig, OptimConfig
    from rlbench.models.full_policy import FullPolicy
    from rlbench.models.policy import Policy
    from rlbench.training.optim import make_optimizer, moment_bytes

    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE), dtype=torch.float32)
    policy = FullPolicy(base) if case == CASES[0] else Policy(base.requires_grad_(False), LoraConfig(rank=16), seed=0)
    config, tables = OptimConfig(name=name, lr=1e-4), policy.table_parameters()
    optimizer = make_optimizer(policy.parameters(), config, tables=tables)
    for parameter in policy.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()

    kept = {id(v): v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)}
    kept |= {id(stand_in): stand_in for stand_in in getattr(optimizer, "_stand_ins", {}).values()}
    paged = sum(value.nbytes for value in kept.values() if getattr(value, "is_paged", False))
    counted = moment_bytes(policy.parameters(), config, tables=tables)
    return {
        "state": sum(value.nbytes for value in kept.values()),
        "of it paged": paged,
        "counted": counted.device + counted.paged,
        "of it counted as paged": counted.paged,
    }


def result(rows: list[dict[str, Any]], device: str) -> dict[str, Any]:
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "bitsandbytes")}
    return {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version()} | versions,
        "commit": commit.stdout.strip(),
        "rows": rows,
    }


if __name__ == "__main__":
    main()
