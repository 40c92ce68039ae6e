"""What this machine offers, found by looking and measuring."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from rlbench.config.derive import HardwareFacts
from rlbench.config.vllm_version import vllm_problem

_PROBE_SHAPES = {  # rows, out, in: a linear layer of a model for that device over one microbatch
    "cpu": (512, 2048, 1024),
    "cuda": (8192, 4096, 4096),
}
_PROBE_ROUNDS = 15
_PROBE_CALLS = {"cpu": 1, "cuda": 8}  # of a round: on a GPU the launch and the wait for it must not weigh
_PROBE_GIB = 1.0  # of a GPU, with room to spare
GIB = 2**30


def hardware_facts(profile: str, memory_cap_gib: float | None = None) -> HardwareFacts:
    """Look at the machine. Takes about 0.3 s on a CPU.

    Args:
        profile: hardware.profile; "cpu" leaves a GPU alone.
        memory_cap_gib: hardware.memory_gib.

    Raises:
        ValueError: the cap is above what is free.
    """
    is_cuda = profile != "cpu" and torch.cuda.is_available()
    device = "cuda" if is_cuda else "cpu"
    num_cores = usable_cores()
    torch.set_num_threads(num_cores)
    free_gib = (torch.cuda.mem_get_info()[0] if is_cuda else _free_host_bytes()) / GIB
    if memory_cap_gib is not None and memory_cap_gib > free_gib:
        raise ValueError(
            f"hardware.memory_gib is {memory_cap_gib:g}, but {free_gib:.1f} GiB of {'device' if is_cuda else 'host'} "
            "memory are free; expected at most that, or null for all that is free"
        )
    return HardwareFacts(
        device=device,
        device_name=torch.cuda.get_device_name() if is_cuda else f"no GPU it may use, {num_cores} CPU cores",
        num_cores=num_cores,
        memory_gib=free_gib if memory_cap_gib is None else memory_cap_gib,
        uncapped_gib=None if memory_cap_gib is None else free_gib,
        matmul_gflops=_matmul_gflops(device),
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
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def _matmul_gflops(device: str) -> dict[str, float]:
    """Best of each dtype over rounds that take them in turn, so that a busy moment of the machine does not decide."""
    has_room = device == "cuda" and torch.cuda.mem_get_info()[0] >= _PROBE_GIB * GIB
    rows, out, inner = _PROBE_SHAPES["cuda" if has_room else "cpu"]
    x = torch.randn(rows, inner, device=device)
    weight = torch.randn(out, inner, device=device)
    best = dict.fromkeys((torch.bfloat16, torch.float32), float("inf"))
    operands = {dtype: (x.to(dtype), weight.to(dtype)) for dtype in best}
    for number in range(_PROBE_ROUNDS + 1):
        for dtype in best:
            start = time.perf_counter()
            for _ in range(_PROBE_CALLS[device]):
                torch.nn.functional.linear(*operands[dtype])
            if device == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                best[dtype] = min(best[dtype], (time.perf_counter() - start) / _PROBE_CALLS[device])
    del x, weight, operands
    if device == "cuda":
        torch.cuda.empty_cache()
    return {str(d).removeprefix("torch."): 2 * rows * out * inner / s / 1e9 for d, s in best.items()}
