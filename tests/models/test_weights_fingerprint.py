"""The fingerprint of all weights: that of either device is computed on either."""

import pytest
import torch

from rlbench.models.weights import Weights


def make_weights(device: str) -> Weights:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (98, 64), "norm": (7,), "odd": (5, 3)}
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    return Weights(tensors={name: tensor.to(device) for name, tensor in tensors.items()})


def test_each_form_sees_a_changed_bit_and_they_differ():
    weights = make_weights("cpu")
    forms = [weights.fingerprint(as_on_gpu=is_gpu) for is_gpu in (True, False)]

    assert forms[0] != forms[1] == weights.fingerprint()

    weights.tensors["odd"].view(torch.int16)[4, 2] ^= 1
    assert all(weights.fingerprint(as_on_gpu=is_gpu) != old for is_gpu, old in zip((True, False), forms, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_gpu", [True, False])
def test_a_form_is_the_same_on_both_devices(is_gpu):
    assert make_weights("cuda").fingerprint(as_on_gpu=is_gpu) == make_weights("cpu").fingerprint(as_on_gpu=is_gpu)
    assert make_weights("cuda").fingerprint() == make_weights("cpu").fingerprint(as_on_gpu=True)
