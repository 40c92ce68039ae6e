"""Dropout inside the fused LoRA functions: a planted mask against PEFT, gradients, what is saved, expectations."""

import pytest
import torch

from rlbench_kernels import Lora, LoraDropout, lora_linear, lora_mlp, lora_qkv, seeded_dropout
from rlbench_kernels.lora_dropout import keep_mask
from rlbench_kernels.lora_matmuls import FORMS
from tests.kernels.test_lora_linear import (
    ALL_FORMS,
    DEPTH,
    INNER,
    KINDS,
    TOLERANCE,
    adapter,
    base,
    check,
    error,
    exact_projection,
    leaves_of,
    random,
    saved_bytes,
    to,
)

P = 0.3
DROPOUTS = [LoraDropout(P, seed) for seed in (11, 12, 13)]
MLP_SIZES = ((INNER, DEPTH), (INNER, DEPTH), (DEPTH, INNER))


def exact_dropped(x, weight, lora, dropout, bias=None):
    """As PEFT: the base sees x itself."""
    if lora is None or dropout is None:
        return exact_projection(x, weight, lora, bias)
    mask = keep_mask(x.flatten(0, -2).shape, dropout, x.device).view(x.shape)
    y = exact_projection(x, weight, None, bias)
    return y + lora.scaling * ((x * mask / (1 - dropout.p)) @ lora.a.double().T) @ lora.b.double().T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_projections_match_float64(dtype, form, kind):
    sizes, ranks = (96, 32, 32), (4, 3, 8)
    bases = [base(o, DEPTH, kind=kind, dtype=dtype, seed=i) for i, o in enumerate(sizes)]
    biases = [None, random(32, dtype=dtype), None]
    exact_loras = [adapter(o, DEPTH, r, seed=i) for i, (o, r) in enumerate(zip(sizes, ranks, strict=True))]
    master = torch.float64 if dtype == torch.float64 else torch.float32
    for absent, undropped in ((None, None), (1, None), (None, 2)):
        exact_used = [None if i == absent else lora for i, lora in enumerate(exact_loras)]
        dropouts = [None if i == undropped else dropout for i, dropout in enumerate(DROPOUTS)]
        loras = [to(lora, master) for lora in exact_used]
        exact_x = random(2, 5, DEPTH).to(dtype).double().requires_grad_()
        x = exact_x.detach().to(dtype).requires_grad_()
        results = lora_qkv(x, bases, loras, biases, dropouts=dropouts, form=form)
        parts = zip(bases, exact_used, dropouts, biases, strict=True)
        exact = [exact_dropped(exact_x, *part) for part in parts]
        check(results, exact, leaves_of(x, loras), leaves_of(exact_x, exact_used), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mlp_matches_float64(dtype, form, kind):
    weights = [base(*size, kind=kind, dtype=dtype, seed=i) for i, size in enumerate(MLP_SIZES)]
    master = torch.float64 if dtype == torch.float64 else torch.float32
    for absent in (None, 0, 2):
        exact_used = [None if i == absent else adapter(*size, 3, seed=i) for i, size in enumerate(MLP_SIZES)]
        loras = [to(lora, master) for lora in exact_used]
        exact_x = random(2, 5, DEPTH).to(dtype).double().requires_grad_()
        x = exact_x.detach().to(dtype).requires_grad_()
        y = lora_mlp(x, *weights, loras, dropouts=DROPOUTS, form=form)
        gate, up = (exact_dropped(exact_x, weights[i], exact_used[i], DROPOUTS[i]) for i in (0, 1))
        exact = exact_dropped(torch.nn.functional.silu(gate) * up, weights[2], exact_used[2], DROPOUTS[2])
        check([y], [exact], leaves_of(x, loras), leaves_of(exact_x, exact_used), TOLERANCE[dtype])


@pytest.mark.parametrize("form", FORMS)
def test_finite_differences_with_the_seed_fixed(form):
    weights = [base(6, 5, kind="dense", dtype=torch.float64, seed=i) for i in range(2)]
    down = base(5, 6, kind="dense", dtype=torch.float64, seed=2)
    loras = [adapter(6, 5, 2), adapter(6, 5, 3, seed=1), adapter(5, 6, 2, seed=2)]

    def call(x, *tensors):
        parts = [Lora(a, b, 0.7) for a, b in zip(tensors[::2], tensors[1::2], strict=True)]
        return (
            *lora_qkv(x, weights, parts[:2], dropouts=DROPOUTS[:2], form=form),
            lora_mlp(x, *weights, down, parts, dropouts=DROPOUTS, form=form),
            seeded_dropout(x, DROPOUTS[0]),
        )

    x = random(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(call, leaves_of(x, loras))


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_as_peft_with_the_same_mask(form, dtype, monkeypatch):
    library = pytest.importorskip("peft", reason="peft is not installed")
    config = library.LoraConfig(r=4, lora_alpha=8, lora_dropout=P, target_modules=["0"])
    (peft,) = library.inject_adapter_in_model(config, torch.nn.Sequential(torch.nn.Linear(DEPTH, 48))).to(dtype)
    peft.base_layer.requires_grad_(False)
    a, b = peft.lora_A["default"].weight, peft.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = random(7, DEPTH, dtype=dtype).requires_grad_()
    planted = torch.rand(7, DEPTH, generator=torch.Generator().manual_seed(1)) > P
    monkeypatch.setattr("rlbench_kernels.lora_dropout.keep_mask", lambda *_: planted)
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p, *_: x * planted / (1 - p))

    bias = peft.base_layer.bias
    y = lora_linear(x, peft.base_layer.weight, a, b, 2.0, bias, dropout=LoraDropout(P, 0), form=form)
    assert 0.5 < planted.double().mean() < 0.9 and error(y, peft(x)) < TOLERANCE[dtype]
    weights = random(7, 48, dtype=dtype)
    mine = torch.autograd.grad((y * weights).sum(), [x, a, b])
    theirs = torch.autograd.grad((peft(x) * weights).sum(), [x, a, b])
    assert all(error(m, t) < TOLERANCE[dtype] for m, t in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_dropout_and_at_p_0_the_bits_are_the_same(form, kind):
    weights = [base(*size, kind=kind, dtype=torch.bfloat16, seed=i) for i, size in enumerate(MLP_SIZES)]
    loras = [to(adapter(*size, seed=i), torch.float32) for i, size in enumerate(MLP_SIZES)]
    x = random(2, 5, DEPTH, dtype=torch.bfloat16).requires_grad_()
    found = []
    for dropouts in (None, [LoraDropout(0.0, 5)] * 3, [None] * 3):
        inner = None if dropouts is None else dropouts[:2]
        results = [
            *lora_qkv(x, weights[:2], loras[:2], dropouts=inner, form=form),
            lora_mlp(x, *weights, loras, dropouts=dropouts, form=form),
        ]
        grads = torch.autograd.grad([y.float().square().sum() for y in results], leaves_of(x, loras))
        found.append([*results, *grads])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_over_many_seeds_the_mean_is_the_result_without_dropout():
    """Of each output, within 5 standard errors, and so is the variance that independent masks have."""
    num_seeds, p = 4000, 0.25
    weight = torch.zeros(6, 16, dtype=torch.float64)
    lora, x = adapter(6, 16), random(1, 16)
    expected = lora_linear(x, weight, *lora).detach()
    draws = torch.stack(
        [lora_linear(x, weight, *lora, dropout=LoraDropout(p, seed)).detach() for seed in range(num_seeds)]
    )
    columns = lora.scaling * lora.b @ lora.a * x  # [6, 16], what each input adds to each output
    variance = (p / (1 - p) * columns.square().sum(1)).detach()
    assert ((draws.mean(0) - expected).abs() < 5 * (variance / num_seeds).sqrt()).all()
    assert torch.allclose(draws.var(0)[0], variance, rtol=0.15)


def test_masks_of_one_input_are_independent_and_a_seed_gives_one_mask():
    x, eye = torch.ones(400, DEPTH), torch.eye(DEPTH)
    loras = [Lora(eye, eye, 1.0)] * 2
    zeros = [torch.zeros(DEPTH, DEPTH)] * 2
    first, second = (y > 0 for y in lora_qkv(x, zeros, loras, dropouts=DROPOUTS[:2]))
    for kept in (first, second):
        assert kept.float().mean() == pytest.approx(1 - P, abs=0.015)
    assert (first & second).float().mean() == pytest.approx((1 - P) ** 2, abs=0.015)
    again, _ = lora_qkv(x, zeros, loras, dropouts=DROPOUTS[:2])
    assert torch.equal(again > 0, first)


def test_torchs_random_state_is_neither_read_nor_moved():
    x = torch.ones(4, DEPTH)
    before = torch.random.get_rng_state()
    first = seeded_dropout(x, DROPOUTS[0])
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(seeded_dropout(x, DROPOUTS[0]), first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{"values": False}, {"overwrite": True}, {"values": False, "overwrite": True}])
def test_gradients_without_values_and_in_the_same_memory(form, kind, options):
    """They are those of the plain call, bit for bit."""
    weights = [base(*size, kind=kind, dtype=torch.float32, seed=i) for i, size in enumerate(MLP_SIZES)]
    loras = [to(adapter(*size, 3, seed=i), torch.float32) for i, size in enumerate(MLP_SIZES)]
    x, weight = random(2, 5, DEPTH, dtype=torch.float32).requires_grad_(), random(2, 5, DEPTH, dtype=torch.float32)
    leaves = leaves_of(x, loras)
    expected = torch.autograd.grad(lora_mlp(x, *weights, loras, dropouts=DROPOUTS, form=form), leaves, weight)
    again = lora_mlp(x, *weights, loras, dropouts=DROPOUTS, form=form, **options)
    for grad, exact in zip(torch.autograd.grad(again, leaves, weight), expected, strict=True):
        assert torch.equal(grad, exact)
    if "values" in options:
        used, both = leaves_of(x, loras[:2]), DROPOUTS[:2]
        first, second = (
            lora_qkv(x, weights[:2], loras[:2], dropouts=both, form=form, values=values) for values in (True, False)
        )
        grads = [random(*y.shape, dtype=torch.float32) for y in first]
        expected = torch.autograd.grad(first, used, grads)
        for grad, exact in zip(torch.autograd.grad(second, used, grads), expected, strict=True):
            assert torch.equal(grad, exact)


@pytest.mark.parametrize("form", FORMS)
def test_as_many_bytes_are_saved_as_without(form):
    weights = [base(*size, kind="nf4", dtype=torch.bfloat16) for size in MLP_SIZES]
    loras = [to(adapter(*size), torch.float32) for size in MLP_SIZES]
    x = random(7, DEPTH, dtype=torch.bfloat16).requires_grad_()
    for call in (
        lambda dropouts: lora_mlp(x, *weights, loras, dropouts=dropouts, form=form),
        lambda dropouts: lora_qkv(x, weights[:2], loras[:2], dropouts=dropouts and dropouts[:2], form=form),
    ):
        assert saved_bytes(lambda call=call: call(DROPOUTS)) == saved_bytes(lambda call=call: call(None))
    assert saved_bytes(lambda: seeded_dropout(x, DROPOUTS[0])) == 0


def test_no_tokens_and_unused_results():
    weights = [base(*size, kind="dense", dtype=torch.float32) for size in MLP_SIZES]
    loras = [to(adapter(*size), torch.float32) for size in MLP_SIZES]
    x = torch.empty(0, DEPTH, requires_grad=True)
    lora_mlp(x, *weights, loras, dropouts=DROPOUTS).sum().backward()
    assert x.grad.shape == (0, DEPTH) and not loras[0].a.grad.any()
    x = random(3, DEPTH, dtype=torch.float32).requires_grad_()
    first, _ = lora_qkv(x, weights[:2], loras[:2], dropouts=DROPOUTS[:2])
    (grad,) = torch.autograd.grad(first.sum(), x)
    alone = lora_linear(x, weights[0], *loras[0], dropout=DROPOUTS[0])
    assert torch.equal(grad, torch.autograd.grad(alone.sum(), x)[0])


def test_errors_name_what_was_expected():
    x, weight, lora = torch.zeros(2, 5), torch.zeros(6, 5), to(adapter(6, 5), torch.float32)
    for wrong in (LoraDropout(1.0, 0), LoraDropout(-0.1, 0), LoraDropout(float("nan"), 0), LoraDropout(0.1, -1)):
        with pytest.raises(ValueError, match=r"dropout 0: p in \[0, 1\) and seed in \[0, 2\*\*63\) expected, got"):
            lora_linear(x, weight, *lora, dropout=wrong)
    with pytest.raises(ValueError, match="2 dropouts, 1 loras: expected the same number"):
        lora_qkv(x, [weight], [lora], dropouts=DROPOUTS[:2])
    with pytest.raises(ValueError, match="dropout: p in"):
        seeded_dropout(x, LoraDropout(2.0, 0))
