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
    backend = os.environ.get("RLBENCH_KERNELS", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"RLBENCH_KERNELS={backend!r}: expected one of {', '.join(BACKENDS)}")
    is_cuda = device.type == "cuda"
    if backend == "reference" or (backend == "auto" and not is_cuda):
        return False
    can_run = has_triton() and (is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
    if backend == "triton" and not can_run:
        raise ValueError(
            f"RLBENCH_KERNELS=triton on {device.type}: needs the package triton and, without CUDA, TRITON_INTERPRET=1"
        )
    return can_run


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
