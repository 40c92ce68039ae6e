"""Where an optimizer's state lies after it was read back: a fused AdamW wants its step beside the parameter."""

import pytest
import torch
from torch import nn

from rlbench.training.checkpoint import _load, _save


class Trained(nn.Module):
    """Two matrices; as much of a policy as a checkpoint reads."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.full((4, 4), value, device=device)) for value in (1.0, 2.0))

    def load(self, folder) -> None:
        del folder

    def save(self, folder, base_name: str) -> None:
        del folder, base_name


def step(trained: Trained, optimizer: torch.optim.Optimizer) -> None:
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device")])]
)  # fmt: skip
def test_an_optimizer_goes_on_with_the_state_that_was_saved(device, is_fused, tmp_path):
    trained = Trained(device)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1, fused=is_fused)
    step(trained, optimizer)
    _save(tmp_path, trained, optimizer, "tiny")  # type: ignore[arg-type]
    saved = [p.detach().clone() for p in trained.parameters()]
    step(trained, optimizer)

    again = Trained(device)
    for parameter, value in zip(again.parameters(), saved, strict=True):
        parameter.data.copy_(value)
    other = torch.optim.AdamW(again.parameters(), lr=0.1, fused=is_fused)
    _load(tmp_path, again, other)  # type: ignore[arg-type]
    step(again, other)

    for found, expected in zip(again.parameters(), trained.parameters(), strict=True):
        assert torch.equal(found, expected)
        assert other.state[found]["step"].device == optimizer.state[expected]["step"].device


@pytest.mark.parametrize(("is_fused", "expected"), [(True, "meta"), (False, "cpu")])
def test_the_step_of_a_fused_optimizer_lies_beside_its_parameter(is_fused, expected, tmp_path):
    trained = Trained("cpu")
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
    step(trained, optimizer)
    _save(tmp_path, trained, optimizer, "tiny")  # type: ignore[arg-type]

    elsewhere = Trained("meta")  # another device that every machine has
    other = torch.optim.AdamW(elsewhere.parameters(), lr=0.1)
    other.param_groups[0]["fused"] = is_fused
    _load(tmp_path, elsewhere, other)  # type: ignore[arg-type]

    state = other.state[elsewhere.a]
    assert state["step"].device.type == expected and state["exp_avg"].device.type == "meta"
