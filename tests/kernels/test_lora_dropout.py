"""Dropout inside the fused LoRA functions: a planted mask against PEFT, gradients, what is saved, expectations."""

import pytest
import torch

from rlbench_kernels import Lora, LoraDropout, lora_linear, lora_mlp, lora_qkv, seeded_dropout
from rlbench_kernels.lora_dropout import drop
from rlbench_kernels.lora_matmuls import FORMS, Projections, cast_adapters, input_gradient
from tests.kernels.lora_cases import (
    ALL_FORMS,
    DEPTH,
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
    error,
    exact_base,
    leaves_of,
    mlp_bases,
    peft_layer,
    random,
    saved_bytes,
    to,
)

P = 0.3
DROPOUTS = [LoraDropout(P, seed) for seed in (11, 12, 13)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_projections_match_float64(dtype, form, kind):
    for absent, undropped in ((None, None), (1, None), (None, 2)):
        dropouts = [None if i == undropped else dropout for i, dropout in enumerate(DROPOUTS)]
        check_projections(dtype, form, kind, absent=absent, dropouts=dropouts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mlp_matches_float64(dtype, form, kind):
    for absent in (None, 0, 2):
        check_mlp(dtype, form, kind, absent=absent, dropouts=DROPOUTS)


@pytest.mark.parametrize("form", FORMS)
def test_finite_differences_with_the_seed_fixed(form):
    check_finite_differences(form, lambda x: [seeded_dropout(x, DROPOUTS[0])], DROPOUTS)


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_as_peft_with_the_same_mask(form, dtype, monkeypatch):
    library = pytest.importorskip("peft", reason="peft is not installed")
    peft, a, b = peft_layer(library, dtype, lora_dropout=P)
    x = random(7, DEPTH, dtype=dtype).requires_grad_()
    planted = torch.rand(7, DEPTH, generator=torch.Generator().manual_seed(1)) > P
    monkeypatch.setattr("rlbench_kernels.lora_dropout.keep_mask", lambda *_: planted)
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p, *_: x * planted / (1 - p))

    assert 0.5 < planted.double().mean() < 0.9
    linear = peft.base_layer
    y = lora_linear(x, linear.weight, a, b, 2.0, linear.bias, dropout=LoraDropout(P, 0), form=form)
    check_same(y, peft(x), [x, a, b], TOLERANCE[dtype])


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_dropout_and_at_p_0_the_bits_are_the_same(form, kind):
    weights = mlp_bases(kind, torch.bfloat16)
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
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_without_values_and_in_the_same_memory(form, kind, options):
    check_same_gradients(form, kind, options, dropouts=DROPOUTS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_that_lie_in_a_buffer_meet_all_bases_in_one_matmul(dtype, kind):
    """Bit for bit: a matmul a base would round the sum once more in bfloat16."""
    bases, sizes = [base(o, DEPTH, kind=kind, dtype=dtype, seed=o) for o in (96, 32)], (96, 32)
    like = torch.empty(0, dtype=dtype)
    loras = [adapter(o, DEPTH, seed=o) for o in sizes]
    adapters = cast_adapters([t.detach() for lora in loras for t in lora[:2]], (0.7, 0.7), DEPTH, like)
    room = random(5, sum(sizes) + adapters.width, dtype=dtype)
    grads, low_grad = room[:, :128].split(sizes, 1), room[:, 128:136]
    frozen = Projections(tuple(bases), (None, None), (0.7, 0.7), tuple(DROPOUTS[:2]), "extended")

    found = input_gradient(grads, low_grad, adapters, frozen, room=room)

    expected = room[:, :128] @ torch.cat([exact_base(weight).to(dtype) for weight in bases])
    for columns, dropout in zip(adapters.columns, DROPOUTS, strict=False):
        drop(low_grad[:, columns] @ adapters.a[columns], dropout, add_to=expected)
    assert torch.equal(found, expected)
    base_by_base = input_gradient(grads, low_grad, adapters, frozen)
    assert error(found, base_by_base) < TOLERANCE[dtype]
    assert dtype == torch.float64 or not torch.equal(found, base_by_base)


@pytest.mark.parametrize("form", FORMS)
def test_as_many_bytes_are_saved_as_without(form):
    weights = mlp_bases("nf4", torch.bfloat16)
    loras = [to(adapter(*size), torch.float32) for size in MLP_SIZES]
    x = random(7, DEPTH, dtype=torch.bfloat16).requires_grad_()
    for call in (
        lambda dropouts: lora_mlp(x, *weights, loras, dropouts=dropouts, form=form),
        lambda dropouts: lora_qkv(x, weights[:2], loras[:2], dropouts=dropouts and dropouts[:2], form=form),
    ):
        assert saved_bytes(lambda call=call: call(DROPOUTS)) == saved_bytes(lambda call=call: call(None))
    assert saved_bytes(lambda: seeded_dropout(x, DROPOUTS[0])) == 0


def test_no_tokens_and_unused_results():
    weights = mlp_bases("dense", torch.float32)
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
