"""`swiglu` and `geglu` against float64 and against transformers' activations."""

import pytest
import torch

from rlbench_kernels import geglu, swiglu

OPS = {"silu": swiglu, "gelu_pytorch_tanh": geglu}


def inputs(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    parts = 3 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return [part.to(dtype).requires_grad_() for part in parts]


@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name):
    assert torch.autograd.gradcheck(OPS[name], tuple(inputs(2, 3, 5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPS)
def test_same_bits_as_transformers(name, dtype):
    from transformers.activations import ACT2FN

    gate, up = inputs(2, 7, 33, dtype=dtype)
    results = OPS[name](gate, up), ACT2FN[name](gate) * up
    assert torch.equal(*results)
    grads = [torch.autograd.grad(result.float().square().sum(), (gate, up)) for result in results]
    for mine, theirs in zip(*grads, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("op", OPS.values())
def test_halves_of_a_fused_tensor(op):
    fused = torch.cat([t.detach() for t in inputs(2, 3, 10)], -1).requires_grad_()
    gate, up = fused.chunk(2, -1)
    result = op(gate, up)
    torch.testing.assert_close(result, op(gate.contiguous(), up.contiguous()))
    assert result.is_contiguous()
    assert torch.autograd.gradcheck(lambda both: op(*both.chunk(2, -1)), (fused,))


def test_large_gates_by_hand():
    gate, up = torch.tensor([100.0, -100.0, 0.0]).requires_grad_(), torch.full((3,), 2.0)
    for op in OPS.values():
        result = op(gate, up)
        assert result.tolist() == [200.0, 0.0, 0.0]
        (grad,) = torch.autograd.grad(result.sum(), gate)
        assert grad.tolist() == [2.0, 0.0, 1.0]


def test_what_does_not_fit_is_refused():
    gate, up = inputs(3, 4)
    with pytest.raises(ValueError, match="one shape"):
        swiglu(gate, up[:2])
    with pytest.raises(ValueError, match="one floating dtype"):
        geglu(gate, up.float())
