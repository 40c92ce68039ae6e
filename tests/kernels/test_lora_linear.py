"""`lora_linear`, `lora_qkv` and `lora_mlp` against plain autograd of W x + s B A x, and against PEFT."""

import pytest
import torch

from rlbench_kernels import lora_linear, lora_mlp, lora_qkv
from rlbench_kernels.lora_matmuls import FORMS
from tests.kernels.lora_cases import (
    ALL_FORMS,
    DEPTH,
    INNER,
    KINDS,
    MLP_SIZES,
    OPTIONS,
    TOLERANCE,
    adapter,
    base,
    check_finite_differences,
    check_mlp,
    check_projections,
    check_same,
    check_same_gradients,
    mlp_bases,
    peft_layer,
    random,
    saved_bytes,
    to,
)

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[
        pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_an_adapter_of_zeros_leaves_the_bits_of_the_base(device, has_bias):
    """In bfloat16; 0 is where every adapter starts."""
    x, weight, bias = (random(*s, dtype=torch.bfloat16).to(device) for s in ((328, 512), (256, 512), (256,)))
    bias = bias if has_bias else None
    a, b = random(8, 512, dtype=torch.float32).to(device), torch.zeros(256, 8, device=device)
    assert torch.equal(lora_linear(x, weight, a, b, 2.0, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_projections_match_float64(dtype, form, kind):
    for absent in (None, 1):
        check_projections(dtype, form, kind, absent=absent)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mlp_matches_float64(dtype, form, kind):
    for activation, absent in (("silu", None), ("gelu_tanh", 0), ("silu", 2)):
        check_mlp(dtype, form, kind, activation=activation, absent=absent)


@pytest.mark.parametrize("form", FORMS)
def test_finite_differences(form):
    check_finite_differences(form, lambda x: ())


@pytest.mark.parametrize("form", FORMS)
def test_an_unused_result_and_unwanted_gradients(form):
    bases = [base(o, DEPTH, kind="nf4", dtype=torch.float32, seed=o) for o in (32, 16)]
    loras = [to(adapter(o, DEPTH), torch.float32) for o in (32, 16)]
    x = random(3, DEPTH, dtype=torch.float32).requires_grad_()
    first, _ = lora_qkv(x, bases, loras, form=form)
    first.sum().backward()
    assert loras[0].a.grad is not None and loras[1].a.grad is None and loras[1].b.grad is None
    alone = x.detach().requires_grad_()
    lora_linear(alone, bases[0], *loras[0], form=form).sum().backward()
    torch.testing.assert_close(x.grad, alone.grad)
    loras[0].a.grad = None
    loras[0].a.requires_grad_(False)
    lora_linear(x.detach(), bases[0], *loras[0], form=form).sum().backward()
    assert loras[0].a.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_without_values_and_in_the_same_memory(form, kind, options):
    for absent in (None, 0, 2):
        check_same_gradients(form, kind, options, absent=absent)


def test_a_second_backward_pass_over_overwritten_memory_is_refused():
    weights = mlp_bases("dense", torch.float32)
    x = random(3, DEPTH, dtype=torch.float32).requires_grad_()
    y = lora_mlp(x, *weights, [None] * 3, overwrite=True).sum()
    y.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="allows one backward pass"):
        y.backward()


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form):
    x = torch.empty(0, DEPTH, requires_grad=True)
    weights = mlp_bases("nf4", torch.float32)
    loras = [to(adapter(*weight.shape), torch.float32) for weight in weights]
    lora_mlp(x, *weights, loras, form=form).sum().backward()
    assert x.grad.shape == (0, DEPTH) and not loras[0].a.grad.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_saved_bytes(form, kind):
    """x, gate and up, the low-rank products and the adapters' casts: nothing of the size of a weight."""
    n, rank, item = 7, 4, 2
    weights = mlp_bases(kind, torch.bfloat16)
    loras = [to(adapter(*size, rank), torch.float32) for size in MLP_SIZES]
    x = random(n, DEPTH, dtype=torch.bfloat16).requires_grad_()
    adapters = sum(rank * (o + d) for o, d in MLP_SIZES)
    assert saved_bytes(lambda: lora_mlp(x, *weights, loras, form=form)) == item * (
        n * (DEPTH + 2 * INNER + 3 * rank) + adapters
    )
    assert saved_bytes(lambda: lora_qkv(x, weights[:2], loras[:2], form=form)) == item * (
        n * (DEPTH + 2 * rank) + 2 * rank * (DEPTH + INNER)
    )


@pytest.mark.parametrize("form", ALL_FORMS)
def test_same_as_peft(form):
    library = pytest.importorskip("peft", reason="peft is not installed")
    peft, a, b = peft_layer(library, use_rslora=True)
    x = random(2, 3, DEPTH, dtype=torch.float32).requires_grad_()
    linear = peft.base_layer
    y = lora_linear(x, linear.weight, a, b, peft.scaling["default"], linear.bias, form=form)
    check_same(y, peft(x), [x, a, b], 1e-6)


def test_errors_name_what_was_expected():
    weight, lora = torch.zeros(6, 5), to(adapter(6, 5), torch.float32)
    x = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"base 0: \[O, 4\] expected, got \[6, 5\]"):
        lora_linear(torch.zeros(2, 4), weight, *lora)
    with pytest.raises(ValueError, match="frozen and torch.float32 expected"):
        lora_linear(x, weight.double(), *lora)
    with pytest.raises(ValueError, match="frozen and torch.float32 expected"):
        lora_linear(x, torch.nn.Parameter(weight), *lora)
    with pytest.raises(ValueError, match=r"lora 0: A \[R, 5\] and B \[6, R\]"):
        lora_linear(x, weight, lora.b, lora.a, 1.0)
    with pytest.raises(ValueError, match="bias 0: frozen torch.float32"):
        lora_linear(x, weight, *lora, torch.zeros(5))
    with pytest.raises(ValueError, match="form 'fast': expected one of auto"):
        lora_linear(x, weight, *lora, form="fast")
    with pytest.raises(ValueError, match="activation 'relu'"):
        lora_mlp(x, weight, weight, weight.T, [None] * 3, "relu")
    with pytest.raises(ValueError, match="1 bases, 2 loras"):
        lora_qkv(x, [weight], [None, None])
