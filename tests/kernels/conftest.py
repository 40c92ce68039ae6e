import pytest
import torch


@pytest.fixture
def triton_backend(monkeypatch):
    monkeypatch.setenv("RLBENCH_KERNELS", "triton")


@pytest.fixture
def poisoned_memory(monkeypatch):
    """What a kernel does not write stays nan."""

    def poisoned(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
