"""Which implementation runs: Triton on CUDA, the PyTorch reference elsewhere.

The environment variable RLBENCH_KERNELS overrides it: `auto` (default), `reference`, `triton`.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

BACKENDS = ("auto", "reference", "triton")


def use_triton(device: torch.device) -> bool:
    """True where the Triton kernels run for tensors on `device`.

    `triton` on a CPU tensor needs Triton's interpreter (TRITON_INTERPRET=1): for tests only, it is slow.

    Raises:
        ValueError: RLBENCH_KERNELS is unknown, or asks for Triton where it cannot run.
    """
    is_cuda = device.type == "cuda"
    can_launch = is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return _use_triton(os.environ.get("RLBENCH_KERNELS", "auto"), device.type, is_cuda, can_launch)


@cache
def _use_triton(backend: str, device: str, is_cuda: bool, can_launch: bool) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"RLBENCH_KERNELS={backend!r}: expected one of {', '.join(BACKENDS)}")
    if backend == "reference" or (backend == "auto" and not is_cuda):
        return False
    can_run = has_triton() and can_launch
    if backend == "triton" and not can_run:
        raise ValueError(
            f"RLBENCH_KERNELS=triton on {device}: needs the package triton and, without CUDA, TRITON_INTERPRET=1"
        )
    return can_run


def cdiv(number: int, divisor: int) -> int:
    """number / divisor, rounded up. `triton.cdiv`, a constexpr function, takes 1.9 us on the host, this 0.1 us."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number` >= 1."""
    return 1 << (number - 1).bit_length()


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
