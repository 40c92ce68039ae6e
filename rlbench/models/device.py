"""What this machine offers, found by looking and measuring."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from rlbench.config.derive import HardwareFacts
from rlbench.config.vllm_version import vllm_problem

_PROBE_SHAPE = (512, 2048, 1024)  # rows, out, in: a linear layer of a small model over one microbatch


def hardware_facts(profile: str) -> HardwareFacts:
    """Look at the machine; `profile` "cpu" leaves a GPU alone. Takes about 0.3 s on a CPU."""
    is_cuda = profile != "cpu" and torch.cuda.is_available()
    device = "cuda" if is_cuda else "cpu"
    num_cores = usable_cores()
    torch.set_num_threads(num_cores)
    return HardwareFacts(
        device=device,
        device_name=torch.cuda.get_device_name() if is_cuda else f"no GPU it may use, {num_cores} CPU cores",
        num_cores=num_cores,
        memory_gib=(torch.cuda.mem_get_info()[0] if is_cuda else _free_host_bytes()) / 2**30,
        matmul_gflops={
            str(d).removeprefix("torch."): _matmul_gflops(d, device) for d in (torch.bfloat16, torch.float32)
        },
        vllm_problem=vllm_problem(device),
    )


def usable_cores() -> int:
    """Cores open to this process: its CPU affinity, and the quota of its control group if that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or no quota ("max")
        pass
    return cores


def _free_host_bytes() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def _matmul_gflops(dtype: torch.dtype, device: str) -> float:
    """Best of five, so that a busy moment of the machine does not decide."""
    rows, out, inner = _PROBE_SHAPE
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(out, inner, device=device).to(dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * rows * out * inner / min(seconds[1:]) / 1e9
