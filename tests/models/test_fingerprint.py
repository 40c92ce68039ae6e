"""The fingerprint of an adapter and of all weights: what changes it, and that no device does."""

from dataclasses import replace

import pytest
import torch

from rlbench.models.adapter import Adapter
from rlbench.models.fingerprint import fingerprint_of, is_of_bytes
from rlbench.models.weights import Weights

SHAPES = {"embed": (98, 64), "norm": (7,), "odd": (5, 3)}


def make_tensors(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator).to(dtype).to(device) for n, s in SHAPES.items()}


def make_adapter(device: str = "cpu") -> Adapter:
    tensors = make_tensors(device, torch.float32)
    return Adapter(lora_a={"q": tensors["odd"]}, lora_b={"q": tensors["embed"]}, scaling=2.0)


def test_one_bit_of_any_tensor_changes_it_and_the_order_of_names_does_not():
    tensors = make_tensors()
    whole = Weights(tensors=tensors).fingerprint()

    assert Weights(tensors=dict(reversed(tensors.items()))).fingerprint() == whole
    for tensor in tensors.values():
        tensor.view(-1).view(torch.int16)[-1] ^= 1
        assert Weights(tensors=tensors).fingerprint() != whole
        tensor.view(-1).view(torch.int16)[-1] ^= 1
    assert Weights(tensors=tensors).fingerprint() == whole


def test_names_shapes_and_dtypes_are_part_of_it():
    tensors = make_tensors()
    forms = [
        tensors,
        {**tensors, "norm": tensors["norm"].view(7, 1)},
        {**tensors, "norm": tensors["norm"].view(torch.float16)},
        {("other" if name == "norm" else name): tensor for name, tensor in tensors.items()},
        {name: tensor for name, tensor in tensors.items() if name != "norm"},
    ]

    assert len({fingerprint_of(form) for form in forms}) == len(forms)


def test_a_scaling_and_sides_that_swap_change_that_of_an_adapter():
    adapter = make_adapter()
    swapped = replace(adapter, lora_a=adapter.lora_b, lora_b=adapter.lora_a)

    prints = {adapter.fingerprint(), replace(adapter, scaling=1.0).fingerprint(), swapped.fingerprint()}
    assert len(prints) == 3


def test_those_of_older_runs_are_told_by_their_length():
    assert is_of_bytes("9f2c01aa83b1d07e")
    assert not is_of_bytes(make_adapter().fingerprint())
    assert not is_of_bytes("")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_and_a_cpu_give_the_same():
    assert Weights(tensors=make_tensors("cuda")).fingerprint() == Weights(tensors=make_tensors()).fingerprint()
    assert make_adapter("cuda").fingerprint() == make_adapter().fingerprint()
    both = {**make_tensors(), "embed": make_tensors("cuda")["embed"]}
    assert Weights(tensors=both).fingerprint() == Weights(tensors=make_tensors()).fingerprint()
