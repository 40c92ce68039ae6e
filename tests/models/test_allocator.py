"""torch's CUDA allocator grows its segments in a process of rlbench, unless the user says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from rlbench.models.allocator import use_expandable_segments

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if key not in NAMES}
    monkeypatch.setattr(os, "environ", own)
    return own


def test_without_a_wish_segments_grow(environment: dict[str, str]) -> None:
    use_expandable_segments()
    # vLLM looks for these words under this name
    assert "expandable_segments:True" in environment["PYTORCH_CUDA_ALLOC_CONF"]


@pytest.mark.parametrize("name", NAMES)
def test_the_users_wish_stays(environment: dict[str, str], name: str) -> None:
    environment[name] = "max_split_size_mb:512"
    use_expandable_segments()
    assert {key: environment.get(key) for key in NAMES} == dict.fromkeys(NAMES) | {name: "max_split_size_mb:512"}


_COMMAND = """
import os, sys
from rlbench.__main__ import main
assert "torch" not in sys.modules
sys.argv = ["rlbench", {argument!r}]
try:
    main()
except SystemExit:
    pass
{then}
"""


def _run(then: str, argument: str = "--version") -> None:
    environment = {key: value for key, value in os.environ.items() if key not in NAMES}
    code = _COMMAND.format(argument=argument, then=then)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_command_says_so_before_torch_is_there() -> None:
    _run('assert "torch" not in sys.modules; assert os.environ["PYTORCH_CUDA_ALLOC_CONF"]')


def test_a_server_gets_the_environment_that_is_printed() -> None:
    _run('assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ', "serve")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_torch_on_a_gpu_follows() -> None:
    _run(
        "import torch\n"
        "kept = torch.zeros(2**25, device='cuda')\n"
        "assert all(segment['is_expandable'] for segment in torch.cuda.memory_snapshot())"
    )
