"""Matrices joined into one have their own dense values, and one launch makes them dense."""

import pytest
import torch

from rlbench_kernels import Nf4Weight, dequantize_nf4, join_rows, lora_mlp, lora_qkv, nf4, quantize_nf4
from rlbench_kernels.lora_bases import Projections
from rlbench_kernels.lora_matmuls import FORMS
from rlbench_kernels.nf4 import NestedAbsmax
from tests.kernels.lora_cases import DEPTH, adapter, leaves_of, random, to
from tests.kernels.test_nf4 import matrix


def double_quantised(rows, depth=DEPTH, *, seed=0, offset=0.07, code_seed=9, nested_blocksize=4):
    """Random bytes; `offset` and the scales are the matrix's own, the code is common."""
    generator = torch.Generator().manual_seed(seed)
    blocks = rows * depth // 64
    packed, absmax = (torch.randint(256, (n,), generator=generator, dtype=torch.uint8) for n in (blocks * 32, blocks))
    scales = torch.rand(-(-blocks // nested_blocksize), generator=generator) * 0.1
    code = torch.randn(256, generator=torch.Generator().manual_seed(code_seed)).sort().values
    nested = NestedAbsmax(scales, code, torch.full_like(scales, offset), nested_blocksize)
    return Nf4Weight(packed, absmax, (rows, depth), torch.float32, 64, nested)


def three(*, sizes=(16, 8, 5), **options):
    return [double_quantised(rows, seed=i, offset=0.1 * i, **options) for i, rows in enumerate(sizes)]


def plain(sizes=(16, 8, 5)):
    return [quantize_nf4(matrix((rows, DEPTH), torch.float32, seed=i)) for i, rows in enumerate(sizes)]


@pytest.mark.parametrize("make", [three, plain])
def test_each_keeps_its_dense_values_and_all_are_rows_of_one(make):
    weights = make()

    joined = join_rows(weights)

    for weight, rows in zip(weights, joined, strict=True):
        assert torch.equal(dequantize_nf4(rows), dequantize_nf4(weight))
    whole = joined[0].whole
    assert [(w.whole is whole, w.first_row) for w in joined] == [(True, 0), (True, 16), (True, 24)]
    assert torch.equal(dequantize_nf4(whole), torch.cat([dequantize_nf4(weight) for weight in weights]))


@pytest.mark.parametrize(
    "weights",
    [
        three(sizes=(16, 7, 5)),  # a block of blocks would hold parts of two
        [double_quantised(8), double_quantised(8, code_seed=1)],
        [double_quantised(8), double_quantised(8, nested_blocksize=8)],
        [double_quantised(8), plain()[0]],
        [double_quantised(8), double_quantised(8, depth=128)],
        [quantize_nf4(torch.ones(4, 96)), quantize_nf4(torch.ones(4, 96))],
    ],
    ids=["blocks", "code", "nested", "kind", "depth", "rows"],
)
def test_what_cannot_be_joined_stays_as_it_is(weights):
    assert all(found is weight for found, weight in zip(join_rows(weights), weights, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_lora_over_joined_matrices_has_the_bits_of_lora_over_separate_ones(form):
    qkv, mlp = three(sizes=(16, 8, 8)), [*three(sizes=(64, 64)), double_quantised(DEPTH, 64, seed=7)]
    joined_qkv, joined_mlp = join_rows(qkv), [*join_rows(mlp[:2]), mlp[2]]

    def run(bases, function):
        loras = [to(adapter(*base.shape, 3, seed=i), torch.float32) for i, base in enumerate(bases)]
        x = random(5, DEPTH, dtype=torch.float32).requires_grad_()
        results = function(x, bases, loras)
        grads = [random(*y.shape, dtype=torch.float32) for y in results]
        return [*results, *torch.autograd.grad(results, leaves_of(x, loras), grads)]

    def project(x, bases, loras):
        return lora_qkv(x, bases, loras, form=form)

    def multiply(x, bases, loras):
        return (lora_mlp(x, *bases, loras, form=form),)

    for separate, joined, function in ((qkv, joined_qkv, project), (mlp, joined_mlp, multiply)):
        for found, expected in zip(run(joined, function), run(separate, function), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_direction_makes_joined_matrices_dense_once(form, monkeypatch):
    calls = []
    real = nf4.reference_dequantize
    monkeypatch.setattr(
        nf4, "reference_dequantize", lambda weight, out: (calls.append(weight.shape), real(weight, out))[1]
    )
    bases = join_rows(three(sizes=(16, 8, 8)))
    loras = [to(adapter(*base.shape, 3), torch.float32) for base in bases]
    x = random(5, DEPTH, dtype=torch.float32).requires_grad_()

    torch.cat(lora_qkv(x, bases, loras, form=form), 1).sum().backward()

    assert calls == [(32, DEPTH)] * 2


def test_rows_of_one_matrix_in_another_order_or_some_of_them_are_no_whole():
    first, second, third = join_rows(three())
    for bases in ((second, first, third), (first, second), (second, third), (first, first, third)):
        frozen = Projections(bases, (None,) * len(bases), (1.0,) * len(bases), (None,) * len(bases), "two_pass")
        assert frozen.whole is None
        for base, dense in zip(bases, frozen.dense(torch.empty(0)), strict=True):
            assert torch.equal(dense, dequantize_nf4(base))


def test_an_offset_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"offset: contiguous \[2\] expected, one a block of blocks, got \[\]"):
        NestedAbsmax(torch.ones(2), torch.ones(256), torch.tensor(0.5))
