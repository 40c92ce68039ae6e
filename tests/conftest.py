import gc
from functools import cache
from pathlib import Path

import pytest
import torch

from rlbench.models import device
from rlbench.models.base import load_base
from tests.tiny import save_tiny_model


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models are tiny, and two files of tests run at a time: more threads would wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def short_collections():
    """What was imported is garbage for no collection; runs collect fully to measure memory."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_measurement():
    """How fast the machine multiplies is measured once, not by every run in this process anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_matmul_gflops", cache(device._matmul_gflops))
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_base(tiny_folder):
    """Float32 base; tests must not change it."""
    return load_base(str(tiny_folder), dtype=torch.float32, device="cpu")
