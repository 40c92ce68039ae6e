"""A LoRA update merged into bfloat16 weights: unbiased, the base untouched by a zero update, one launch = reference."""

import pytest
import torch

from rlbench_kernels.merge_lora import hash_places, merge_lora_, round_stochastically
from tests.kernels.interpreter import IS_INTERPRETED, on_cpu, run_interpreted

DEVICES = [
    pytest.param("cpu", id="reference" if not IS_INTERPRETED else "interpreted"),
    pytest.param("cuda", marks=[
        pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]),
]  # fmt: skip
STEP = 2.0**-8  # of bfloat16 at 1 to 2, twice below


@on_cpu
def test_kernel_under_the_interpreter():
    run_interpreted(__file__)


def matrices(rows, columns, rank, device, *, scale):
    generator = torch.Generator().manual_seed(rows + columns + rank)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16().to(device)

    return draw(rows, columns), draw(rank, columns), draw(rows, rank) * scale


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(64, 128, 16), (70, 136, 8), (33, 200, 40), (5, 3, 1)])
def test_every_element_is_a_neighbour_of_the_exact_sum(device, rows, columns, rank):
    weight, a, b = matrices(rows, columns, rank, device, scale=0.05)
    exact = weight.double() + b.double() @ a.double()

    merged = merge_lora_(weight.clone(), a, b, seed=3).double()

    low = torch.where(exact.abs() > 0, 2.0 ** torch.floor(torch.log2(exact.abs())), torch.zeros_like(exact)) / 128
    assert ((merged - exact).abs() < low * 1.001 + 1e-6).all()
    assert (merged != weight.double()).float().mean() > 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_updates_far_below_a_step_survive_in_the_mean(device):
    weight = torch.ones(128, 256, dtype=torch.bfloat16, device=device)
    a = torch.ones(1, 256, dtype=torch.bfloat16, device=device)
    b = torch.full((128, 1), STEP / 64, dtype=torch.bfloat16, device=device)
    assert torch.equal(weight + b @ a, weight)  # rounded to nearest: nothing is left of it

    merged = merge_lora_(weight.clone(), a, b, seed=1).double()

    assert set(merged.unique().tolist()) == {1.0, 1 + 2 * STEP}
    error = (merged.mean() - 1).item() / (STEP / 64) - 1
    assert abs(error) < 4 * (128 / (128 * 256)) ** 0.5  # four deviations of a binomial with p = 1 / 128


@pytest.mark.parametrize("device", DEVICES)
def test_signs_and_sizes_are_rounded_alike(device):
    """The mean error over many draws of 0.3 steps up and down, at small and large weights of both signs."""
    for value in (0.75, -0.75, 3e-3, -40.0):
        weight = torch.full((64, 512), value, dtype=torch.bfloat16, device=device)
        step = 2.0 ** torch.floor(torch.log2(weight[0, 0].double().abs())) / 128
        for share in (0.3, -0.3):
            a = torch.full((1, 512), share, dtype=torch.bfloat16, device=device)
            b = torch.full((64, 1), step.item(), dtype=torch.bfloat16, device=device)
            merged = merge_lora_(weight.clone(), a, b, seed=9).double()
            moved = ((merged - weight.double()) / step).mean().item()
            assert moved == pytest.approx(a[0, 0].item(), abs=4 * (0.21 / weight.numel()) ** 0.5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_zero_update_keeps_every_bit(device):
    weight, a, b = matrices(70, 136, 8, device, scale=0.0)

    assert torch.equal(merge_lora_(weight.clone(), a, b, seed=7), weight)


@pytest.mark.parametrize("device", DEVICES)
def test_draws_follow_seed_and_place_alone(device):
    weight, a, b = matrices(64, 128, 16, device, scale=0.01)
    first = merge_lora_(weight.clone(), a, b, seed=2**32 - 5)

    assert torch.equal(merge_lora_(weight.clone(), a, b, seed=2**32 - 5), first)
    assert (merge_lora_(weight.clone(), a, b, seed=4) != first).float().mean() > 0.1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", [0, 12345, 2**31, 2**32 - 1])
def test_the_kernel_draws_what_the_reference_draws(device, seed):
    """Rank 1 sums have one product, so nothing but the draws can differ."""
    weight, a, b = matrices(70, 136, 1, device, scale=0.05)
    expected = round_stochastically(weight.cpu().float() + b.cpu().float() @ a.cpu().float(), seed)

    assert torch.equal(merge_lora_(weight.clone(), a, b, seed=seed).cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_slice_of_a_wider_matrix_is_merged_in_place(device):
    wide, a, b = matrices(64, 128, 16, device, scale=0.05)
    whole, rest = wide.clone(), wide[:, 128:].clone()
    part = whole[16:48]

    merge_lora_(part, a, b[16:48], seed=5)

    assert torch.equal(whole[:16], wide[:16]) and torch.equal(whole[48:], wide[48:]) and not rest.numel()
    assert torch.equal(part, merge_lora_(wide[16:48].clone(), a, b[16:48].T.contiguous().T, seed=5))


def test_float32_takes_the_sum():
    weight, a, b = (tensor.float() for tensor in matrices(70, 136, 8, "cpu", scale=0.05))

    torch.testing.assert_close(merge_lora_(weight.clone(), a, b, seed=7), weight + b @ a)


def test_hash_bits_are_even():
    draws = hash_places(torch.arange(2**16), 17)
    bits = torch.stack([(draws >> i & 1).double().mean() for i in range(32)])
    assert ((bits - 0.5).abs() < 4 * 0.5 / 2**8).all()
    assert len(draws.unique()) == 2**16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, a, b: (w.half(), a, b, 0), "weight: a bfloat16 or float32 matrix"),
        (lambda w, a, b: (w, a.float(), b, 0), "lora_a: a bfloat16 or float32 matrix, as the weight"),
        (lambda w, a, b: (w, a, b[:3], 0), r"expected \[R, 128\] and \[64, R\]"),
        (lambda w, a, b: (w.T.contiguous().T, a, b, 0), "unit stride"),
        (lambda w, a, b: (w, a, b, 2**32), "seed: 0 to 4294967295"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        merge_lora_(*change(*matrices(64, 128, 16, "cpu", scale=0.05)))
