"""`apply_rope` against float64 and against transformers' function."""

import pytest
import torch

from rlbench_kernels import apply_rope


def angles(positions, size, dtype=torch.float64):
    """cos and sin [T, hd], both halves equal."""
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    phase = (positions.double()[:, None] * frequencies).repeat(1, 2)
    return phase.cos().to(dtype), phase.sin().to(dtype)


def inputs(tokens=5, queries=4, keys=2, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(tokens, heads, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (queries, keys)
    )
    positions = torch.arange(tokens) % 3  # two packed sequences
    return q, k, *angles(positions, size, dtype)


def test_a_quarter_turn_by_hand():
    q = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    turned, same = apply_rope(q, q, zero, one)[0], apply_rope(q, q, one, zero)[1]
    assert turned.tolist() == [[[-3.0, -4.0, 1.0, 2.0]]] and torch.equal(same, q)


def test_gradcheck():
    q, k, cos, sin = inputs()
    assert torch.autograd.gradcheck(lambda a, b: apply_rope(a, b, cos, sin), (q, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_as_transformers(dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, cos, sin = inputs(7, 6, 3, 16, dtype)
    mine, theirs = apply_rope(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin)
    grads = [torch.autograd.grad(results, (q, k), [x.detach() for x in mine]) for results in (mine, theirs)]
    for pair in (*zip(mine, theirs, strict=True), *zip(*grads, strict=True)):
        assert torch.equal(*pair) and pair[0].dtype == dtype


def test_the_gradient_undoes_the_rotation():
    q, k, cos, sin = inputs()
    results = apply_rope(q, k, cos, sin)
    for grad, leaf in zip(torch.autograd.grad(results, (q, k), [r.detach() for r in results]), (q, k), strict=True):
        torch.testing.assert_close(grad, leaf.detach())


def test_products_depend_on_the_distance_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16, generator=generator, dtype=torch.float64)
    products = []
    for start in (0, 11):
        rotated = [apply_rope(x, x, *angles(torch.tensor([p]), 16))[0] for x, p in ((q, start + 5), (k, start))]
        products.append((rotated[0] * rotated[1]).sum())
    torch.testing.assert_close(*products)


def test_float32_angles_keep_the_dtype_of_the_heads_and_views_are_read():
    q, k, cos, sin = inputs(dtype=torch.bfloat16)
    fused = torch.cat((q, k), 1).detach()
    results = apply_rope(fused[:, :4], fused[:, 4:], cos.float(), sin.float())
    assert [r.dtype for r in results] == [torch.bfloat16] * 2
    for mine, other in zip(results, apply_rope(q, k, cos.float(), sin.float()), strict=True):
        assert torch.equal(mine, other) and mine.is_contiguous()


def test_what_does_not_fit_is_refused():
    q, k, cos, sin = inputs()
    with pytest.raises(ValueError, match="cos and sin"):
        apply_rope(q, k, cos[:, :4], sin)
    with pytest.raises(ValueError, match="Hk"):
        apply_rope(q, k[:4], cos, sin)
    with pytest.raises(ValueError, match="even"):
        apply_rope(q[..., :7], k[..., :7], cos[:, :7], sin[:, :7])
    with pytest.raises(ValueError, match="detach"):
        apply_rope(q, k, cos.clone().requires_grad_(), sin)
