"""Paged AdamW: the unpaged one's arithmetic, which moments are paged, and checkpoints that fill paged buffers.

A CPU has no managed memory: there tensors that carry its marks stand in for it, and no driver moves anything.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlbench.config.schema import OptimConfig
from rlbench.training.checkpoint import _load, _save
from rlbench.training.optim import make_optimizer, moment_bytes

NAMES = ["paged_adamw", "paged_adamw_8bit"]
SHAPES = {"wide": (1024, 1024), "tall": (2048, 512), "odd": (317, 320), "small": (312, 320), "vector": (1024,)}
PAGED = {"wide", "tall", "odd"}  # "small" has 99,840 numbers
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def stand_in(optimizer, parameter, dtype=torch.float32):
    """`get_state_buffer` of bitsandbytes, without a GPU."""
    buffer = torch.zeros_like(parameter, dtype=dtype)
    if optimizer.is_paged and parameter.numel() >= 1e5:
        buffer.is_paged, buffer.page_deviceid = True, 0
        optimizer.page_mng.paged_tensors.append(buffer)
    return buffer


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=[
        pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])]
)  # fmt: skip
def device(request, monkeypatch):
    library = pytest.importorskip("bitsandbytes.optim.optimizer")
    monkeypatch.setattr(library.F.GlobalPageManager.get_instance(), "paged_tensors", [])
    if request.param == "cpu":
        monkeypatch.setattr(library.Optimizer8bit, "get_state_buffer", stand_in)
        monkeypatch.setattr(library.F, "prefetch_tensor", lambda tensor: None)
    return request.param


class Trained(nn.Module):
    """As much of a policy as a checkpoint reads and writes."""

    def __init__(self, device: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator).to(device)))

    def save(self, folder: Path, base_name: str) -> None:
        del base_name
        save_file({name: p.detach().cpu() for name, p in self.named_parameters()}, folder / "weights.safetensors")

    def load(self, folder: Path) -> None:
        for name, value in load_file(folder / "weights.safetensors").items():
            self.get_parameter(name).data.copy_(value)


def start(name: str, device: str) -> tuple[Trained, torch.optim.Optimizer]:
    trained = Trained(device)
    config = OptimConfig(name=name, lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    return trained, make_optimizer(list(trained.parameters()), config)


def make_steps(trained: Trained, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in trained.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        optimizer.step()


def bits(trained: Trained, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters, and all that the optimizer keeps of them."""
    found = {name: parameter.detach().cpu().clone() for name, parameter in trained.named_parameters()}
    for name, parameter in trained.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name}|{key}"] = torch.as_tensor(value).detach().cpu().clone()
    return found


def assert_equal_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


def paged_buffers(trained: Trained, optimizer: torch.optim.Optimizer) -> dict[str, list[torch.Tensor]]:
    """By the names of their parameters."""
    found = {
        name: [value for value in optimizer.state[parameter].values() if getattr(value, "is_paged", False)]
        for name, parameter in trained.named_parameters()
    }
    return {name: buffers for name, buffers in found.items() if buffers}


@pytest.mark.parametrize("name", NAMES)
def test_paged_steps_have_the_bits_of_unpaged_ones(device, name):
    library = pytest.importorskip("bitsandbytes.optim.adamw")
    unpaged = {"paged_adamw": library.AdamW, "paged_adamw_8bit": library.AdamW8bit}[name]
    trained, optimizer = start(name, device)
    other = Trained(device)
    its_optimizer = unpaged(other.parameters(), **OPTIONS)
    for each in ((trained, optimizer), (other, its_optimizer)):
        make_steps(*each, range(5))

    assert not paged_buffers(other, its_optimizer)
    assert_equal_bits(bits(trained, optimizer), bits(other, its_optimizer))
    assert not torch.equal(trained.wide, Trained(device).wide)


@pytest.mark.parametrize("name", NAMES)
def test_both_moments_of_large_tensors_are_paged_and_counted_as_such(device, name):
    trained, optimizer = start(name, device)
    make_steps(trained, optimizer, range(1))
    buffers = paged_buffers(trained, optimizer)

    assert {name: len(found) for name, found in buffers.items()} == dict.fromkeys(PAGED, 2)
    assert all(b.device.type == "cpu" for found in buffers.values() for b in found)  # not of torch's GPU allocator
    counted = moment_bytes(list(trained.parameters()), OptimConfig(name=name))
    assert sum(b.nbytes for found in buffers.values() for b in found) == counted.paged
    others = [p for name, p in trained.named_parameters() if name not in PAGED]
    assert sum(optimizer.state[p][key].nbytes for p in others for key in ("state1", "state2")) == counted.device
    assert {optimizer.state[p]["state1"].device.type for p in others} == {device}


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_bit_for_bit_with_paged_buffers_after_a_restore(device, name, tmp_path):
    trained, optimizer = start(name, device)
    make_steps(trained, optimizer, range(3))
    _save(tmp_path, trained, optimizer, "tiny")  # type: ignore[arg-type]
    saved = bits(trained, optimizer)
    make_steps(trained, optimizer, range(3, 6))

    again, its_optimizer = start(name, device)
    _load(tmp_path, again, its_optimizer)  # type: ignore[arg-type]
    assert_equal_bits(bits(again, its_optimizer), saved)
    assert {name: len(b) for name, b in paged_buffers(again, its_optimizer).items()} == dict.fromkeys(PAGED, 2)
    make_steps(again, its_optimizer, range(3, 6))

    assert_equal_bits(bits(again, its_optimizer), bits(trained, optimizer))
    assert paged_buffers(again, its_optimizer).keys() == PAGED


@pytest.mark.parametrize("name", NAMES)
def test_a_restore_into_a_used_optimizer_fills_the_buffers_that_are_there(device, name, tmp_path):
    trained, optimizer = start(name, device)
    make_steps(trained, optimizer, range(2))
    _save(tmp_path, trained, optimizer, "tiny")  # type: ignore[arg-type]
    saved, before = bits(trained, optimizer), paged_buffers(trained, optimizer)
    make_steps(trained, optimizer, range(2, 4))
    _load(tmp_path, trained, optimizer)  # type: ignore[arg-type]

    assert_equal_bits(bits(trained, optimizer), saved)
    after = paged_buffers(trained, optimizer)
    places = [{name: [b.data_ptr() for b in found] for name, found in each.items()} for each in (before, after)]
    assert places[0] == places[1]
    assert len(optimizer.page_mng.paged_tensors) == 2 * len(PAGED)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_without_bitsandbytes_it_is_refused_in_one_sentence(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ValueError, match=f"optim.name is {name}, which needs .* expected it installed, or adamw$"):
        start(name, "cpu")
