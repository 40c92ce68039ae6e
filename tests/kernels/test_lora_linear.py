"""`lora_linear`, `lora_qkv` and `lora_mlp` against plain autograd of W x + s B A x, and against PEFT."""

import pytest
import torch
import torch.nn.functional as F

from rlbench_kernels import (
    Fp8Weight,
    Lora,
    dequantize_nf4,
    lora_linear,
    lora_mlp,
    lora_qkv,
    quantize_fp8,
    quantize_nf4,
)
from rlbench_kernels.lora_matmuls import FORMS

KINDS = ("dense", "nf4", "fp8")
ALL_FORMS = ("auto", *FORMS)
# relative Frobenius error against float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
DEPTH, INNER = 64, 128


def random(*shape, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def base(rows, depth, *, kind, dtype, seed=0):
    dense = random(rows, depth, dtype=torch.float32, scale=depth**-0.5, seed=seed)
    if kind == "nf4":
        return quantize_nf4(dense.bfloat16())
    return quantize_fp8(dense.bfloat16()) if kind == "fp8" else dense.to(dtype)


def adapter(rows, depth, rank=4, scaling=0.7, seed=0):
    """Master weights: float64 below, cast by the caller."""
    a = random(rank, depth, scale=depth**-0.5, seed=seed).requires_grad_()
    return Lora(a, random(rows, rank, seed=seed + 1).requires_grad_(), scaling)


def to(lora, dtype):
    if lora is None:
        return None
    return Lora(*(t.detach().to(dtype).requires_grad_(t.requires_grad) for t in lora[:2]), lora.scaling)


def exact_base(weight):
    if isinstance(weight, Fp8Weight):
        return weight.codes.double() * weight.scale.double()
    return (weight if isinstance(weight, torch.Tensor) else dequantize_nf4(weight, torch.empty(weight.shape))).double()


def exact_projection(x, weight, lora, bias=None):
    y = F.linear(x, exact_base(weight).to(x.device), None if bias is None else bias.double())
    return y if lora is None else y + lora.scaling * ((x @ lora.a.double().T) @ lora.b.double().T)


def exact_mlp(x, weights, loras, activation="silu"):
    act = F.silu if activation == "silu" else lambda z: F.gelu(z, approximate="tanh")
    gate, up = (exact_projection(x, w, lora) for w, lora in zip(weights[:2], loras[:2], strict=True))
    return exact_projection(act(gate) * up, weights[2], loras[2])


def error(actual, exact):
    actual, exact = actual.detach().double(), exact.detach().double()
    return float((actual - exact).norm() / exact.norm())


def check(results, exact, leaves, exact_leaves, tolerance):
    """Values, and the gradients of a weighted sum of all results."""
    for result, value in zip(results, exact, strict=True):
        assert result.shape == value.shape and error(result, value) < tolerance
    weights = [random(*value.shape, seed=i) for i, value in enumerate(exact)]
    loss = sum((r * w.to(r)).sum() for r, w in zip(results, weights, strict=True))
    exact_loss = sum((r * w.to(r)).sum() for r, w in zip(exact, weights, strict=True))
    grads = torch.autograd.grad(loss, leaves)
    for leaf, grad, value in zip(leaves, grads, torch.autograd.grad(exact_loss, exact_leaves), strict=True):
        assert grad.dtype == leaf.dtype and error(grad, value) < tolerance


def leaves_of(x, loras):
    return [x, *(t for lora in loras if lora is not None for t in lora[:2])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_projections_match_float64(dtype, form, kind):
    sizes, ranks = (96, 32, 32), (4, 3, 8)
    bases = [base(o, DEPTH, kind=kind, dtype=dtype, seed=i) for i, o in enumerate(sizes)]
    biases = [None, random(32, dtype=dtype), None]
    exact_loras = [adapter(o, DEPTH, r, seed=i) for i, (o, r) in enumerate(zip(sizes, ranks, strict=True))]
    master = torch.float64 if dtype == torch.float64 else torch.float32
    for absent in (None, 1):
        exact_used = [None if i == absent else lora for i, lora in enumerate(exact_loras)]
        loras = [to(lora, master) for lora in exact_used]
        exact_x = random(2, 5, DEPTH).to(dtype).double().requires_grad_()
        x = exact_x.detach().to(dtype).requires_grad_()
        results = lora_qkv(x, bases, loras, biases, form=form)
        exact = [exact_projection(exact_x, *parts) for parts in zip(bases, exact_used, biases, strict=True)]
        check(results, exact, leaves_of(x, loras), leaves_of(exact_x, exact_used), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mlp_matches_float64(dtype, form, kind):
    sizes = ((INNER, DEPTH), (INNER, DEPTH), (DEPTH, INNER))
    weights = [base(*size, kind=kind, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    exact_loras = [adapter(*size, rank, seed=i) for i, (size, rank) in enumerate(zip(sizes, (4, 3, 8), strict=True))]
    master = torch.float64 if dtype == torch.float64 else torch.float32
    for activation, absent in (("silu", None), ("gelu_tanh", 0), ("silu", 2)):
        exact_used = [None if i == absent else lora for i, lora in enumerate(exact_loras)]
        loras = [to(lora, master) for lora in exact_used]
        exact_x = random(2, 5, DEPTH).to(dtype).double().requires_grad_()
        x = exact_x.detach().to(dtype).requires_grad_()
        y = lora_mlp(x, *weights, loras, activation, form=form)
        exact = exact_mlp(exact_x, weights, exact_used, activation)
        check([y], [exact], leaves_of(x, loras), leaves_of(exact_x, exact_used), TOLERANCE[dtype])


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    weights = [base(6, 5, kind="dense", dtype=torch.float64), base(6, 5, kind="dense", dtype=torch.float64, seed=1)]
    down = base(5, 6, kind="dense", dtype=torch.float64, seed=2)
    loras = [adapter(6, 5, 2), adapter(6, 5, 3, seed=1), adapter(5, 6, 2, seed=2)]

    def call(x, *tensors):
        parts = [Lora(a, b, 0.7) for a, b in zip(tensors[::2], tensors[1::2], strict=True)]
        return *lora_qkv(x, weights, parts[:2], form=form), lora_mlp(x, *weights, down, parts, form=form)

    x = random(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(call, leaves_of(x, loras))


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
@pytest.mark.parametrize("options", [{"values": False}, {"overwrite": True}, {"values": False, "overwrite": True}])
def test_gradients_without_values_and_in_the_same_memory(form, kind, options):
    """They are those of the plain call, bit for bit."""
    sizes = ((INNER, DEPTH), (INNER, DEPTH), (DEPTH, INNER))
    weights = [base(*size, kind=kind, dtype=torch.float32, seed=i) for i, size in enumerate(sizes)]
    for absent in (None, 0, 2):
        loras = [None if i == absent else to(adapter(*size, 3, seed=i), torch.float32) for i, size in enumerate(sizes)]
        x = random(2, 5, DEPTH, dtype=torch.float32).requires_grad_()
        leaves, weight = leaves_of(x, loras), random(2, 5, DEPTH, dtype=torch.float32)
        y = lora_mlp(x, *weights, loras, form=form)
        expected = torch.autograd.grad((y * weight).sum(), leaves)
        again = lora_mlp(x, *weights, loras, form=form, **options)
        assert again.shape == y.shape and (options.get("values") is False or torch.equal(again, y))
        for grad, exact in zip(torch.autograd.grad(again, leaves, weight), expected, strict=True):
            assert torch.equal(grad, exact)
        if "values" in options:
            first = lora_qkv(x, weights[:2], loras[:2], form=form)
            second = lora_qkv(x, weights[:2], loras[:2], form=form, values=False)
            grads = [random(*y.shape, dtype=torch.float32) for y in first]
            used = leaves_of(x, loras[:2])
            expected = torch.autograd.grad(first, used, grads)
            for grad, exact in zip(torch.autograd.grad(second, used, grads), expected, strict=True):
                assert torch.equal(grad, exact)


def test_a_second_backward_pass_over_overwritten_memory_is_refused():
    weights = [base(*size, kind="dense", dtype=torch.float32) for size in ((INNER, DEPTH),) * 2 + ((DEPTH, INNER),)]
    x = random(3, DEPTH, dtype=torch.float32).requires_grad_()
    y = lora_mlp(x, *weights, [None] * 3, overwrite=True).sum()
    y.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="allows one backward pass"):
        y.backward()


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form):
    x = torch.empty(0, DEPTH, requires_grad=True)
    weights = [base(*size, kind="nf4", dtype=torch.float32) for size in ((INNER, DEPTH),) * 2 + ((DEPTH, INNER),)]
    loras = [to(adapter(*weight.shape), torch.float32) for weight in weights]
    lora_mlp(x, *weights, loras, form=form).sum().backward()
    assert x.grad.shape == (0, DEPTH) and not loras[0].a.grad.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_saved_bytes(form, kind):
    """x, gate and up, the low-rank products and the adapters' casts: nothing of the size of a weight."""
    n, rank, item = 7, 4, 2
    sizes = ((INNER, DEPTH), (INNER, DEPTH), (DEPTH, INNER))
    weights = [base(*size, kind=kind, dtype=torch.bfloat16) for size in sizes]
    loras = [to(adapter(*size, rank), torch.float32) for size in sizes]
    x = random(n, DEPTH, dtype=torch.bfloat16).requires_grad_()
    adapters = sum(rank * (o + d) for o, d in sizes)
    assert saved_bytes(lambda: lora_mlp(x, *weights, loras, form=form)) == item * (
        n * (DEPTH + 2 * INNER + 3 * rank) + adapters
    )
    assert saved_bytes(lambda: lora_qkv(x, weights[:2], loras[:2], form=form)) == item * (
        n * (DEPTH + 2 * rank) + 2 * rank * (DEPTH + INNER)
    )


def saved_bytes(call):
    """Bytes of the distinct storages that the backward pass keeps."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(storages.values())


@pytest.mark.parametrize("form", ALL_FORMS)
def test_same_as_peft(form):
    library = pytest.importorskip("peft", reason="peft is not installed")
    config = library.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["0"])
    linear = torch.nn.Linear(DEPTH, 48)
    (peft,) = library.inject_adapter_in_model(config, torch.nn.Sequential(linear))
    linear.requires_grad_(False)
    a, b = peft.lora_A["default"].weight, peft.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = random(2, 3, DEPTH, dtype=torch.float32).requires_grad_()
    y = lora_linear(x, linear.weight, a, b, peft.scaling["default"], linear.bias, form=form)
    assert error(y, peft(x)) < 1e-6
    weights = random(2, 3, 48, dtype=torch.float32)
    mine = torch.autograd.grad((y * weights).sum(), [x, a, b])
    theirs = torch.autograd.grad((peft(x) * weights).sum(), [x, a, b])
    assert all(error(m, t) < 1e-6 for m, t in zip(mine, theirs, strict=True))


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
