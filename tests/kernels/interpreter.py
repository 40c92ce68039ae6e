"""Runs a test file's Triton kernels on the CPU, in a process of its own with Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
gpu = pytest.mark.gpu
needs_device = pytest.mark.skipif(
    not IS_INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device or TRITON_INTERPRET=1"
)
needs_gpu = pytest.mark.skipif(IS_INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
on_cpu = pytest.mark.skipif(
    IS_INTERPRETED or torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="triton is not installed, or there is a GPU for the kernels",
)


def run_interpreted(file: str) -> None:
    """Asserts that the tests of `file` pass under the interpreter."""
    here = Path(file)
    environment = os.environ | {"TRITON_INTERPRET": "1", "RLBENCH_KERNELS": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "--confcutdir", str(here.parent), str(here)]
    root = here.parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float32 values in `dtype` as a kernel stores them: the interpreter truncates to bfloat16."""
    if IS_INTERPRETED and dtype == torch.bfloat16:
        return (values.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    return values.to(dtype)
