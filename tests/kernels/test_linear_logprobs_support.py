"""`support_thresholds` and `support`: against hand-computed numbers, the engine's sampler, and each other."""

import math

import pytest
import torch

import rlbench_kernels.linear_logprobs_support as module
from rlbench.engine.sampling import draw_tokens, truncate
from rlbench.records import SamplingParams
from rlbench_kernels import Lora, linear_logprobs, linear_token_loss, support_thresholds
from tests.kernels.interpreter import IS_INTERPRETED, on_cpu, run_interpreted

DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
TRUNCATIONS = [
    {"top_p": 0.9}, {"top_p": 0.3}, {"top_p": 1e-6}, {"top_p": 0.9999}, {"top_k": 1}, {"top_k": 40}, {"top_k": 5000},
    {"min_p": 0.02}, {"min_p": 1.0}, {"min_p": 0.01, "top_k": 7}, {"top_k": 60, "top_p": 0.5},
    {"min_p": 0.001, "top_p": 0.7}, {"min_p": 0.005, "top_k": 30, "top_p": 0.9},
]  # fmt: skip
gpu = pytest.mark.gpu
triton_here = pytest.mark.skipif(
    not IS_INTERPRETED and DEVICE == "cpu", reason="needs a CUDA device or TRITON_INTERPRET=1"
)


def named(truncation):
    return " ".join(f"{name}={value}" for name, value in truncation.items())


def of_logits(logits, **options):
    """Thresholds of given logits [N, V]: hidden [N, N] is the unit matrix."""
    weight = logits.T.contiguous()
    return support_thresholds(torch.eye(len(logits), dtype=weight.dtype, device=weight.device), weight, **options)


def random_logits(n=9, v=3000, seed=0):
    """Rows from flat to sharp; flat ones need more than the shortlist for top_p."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, v, generator=generator) * torch.logspace(-1, 1, n)[:, None]


def test_hand_computed_thresholds():
    probs = torch.tensor([[0.05, 0.5, 0.15, 0.3]], dtype=torch.float64)

    def halfway(inside, outside):
        return 0.5 * (math.log(inside) + math.log(outside))

    def threshold(**options):
        return float(of_logits(probs.log(), **options))

    assert threshold() == threshold(top_k=4) == threshold(min_p=0.1) == -math.inf
    assert threshold(top_p=0.6) == pytest.approx(halfway(0.3, 0.15))
    assert threshold(top_p=0.5) == pytest.approx(halfway(0.5, 0.3))
    assert threshold(top_k=3) == pytest.approx(halfway(0.15, 0.05))
    assert threshold(min_p=0.31) == pytest.approx(halfway(0.3, 0.15))
    # of 0.5 and 0.3 that top_k leaves, 0.5 is 0.625
    assert threshold(top_k=2, top_p=0.6) == pytest.approx(halfway(0.5, 0.3))
    assert threshold(top_k=2, top_p=0.63) == pytest.approx(halfway(0.3, 0.15))
    # squared and normalised, 0.5 is 0.685 and 0.3 is 0.247
    assert threshold(temperature=0.5, top_p=0.7) == pytest.approx(2 * halfway(0.3, 0.15))


def test_equal_scores_at_the_end_are_all_inside():
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0, 0.0]])
    for options in ({"top_k": 2}, {"top_p": 0.6}):
        threshold = of_logits(logits, **options)
        assert (logits >= threshold[:, None]).tolist() == [[True] * 4 + [False] * 2]


@pytest.mark.skipif(IS_INTERPRETED, reason="the reference")
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=named)
def test_the_support_is_what_the_engine_keeps(truncation):
    logits = random_logits()
    kept = truncate(logits / 0.7, SamplingParams(max_tokens=1, **truncation)) > -torch.inf
    thresholds = of_logits(logits, temperature=0.7, **truncation)
    assert torch.equal(logits / 0.7 >= thresholds[:, None], kept)


@pytest.mark.skipif(IS_INTERPRETED, reason="the reference")
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=named)
def test_logprobs_on_the_support_are_those_the_engine_reports(truncation):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(40, 24, generator=generator), torch.randn(2000, 24, generator=generator)
    sampling = SamplingParams(max_tokens=1, temperature=0.8, **truncation)
    tokens, reported = draw_tokens(hidden @ weight.T, sampling, torch.linspace(0, 0.999, 40, dtype=torch.float64))
    support = support_thresholds(hidden, weight, temperature=0.8, **truncation)
    logprobs, _ = linear_logprobs(hidden, weight, tokens, temperature=0.8, support=support)
    torch.testing.assert_close(logprobs, reported, rtol=1e-5, atol=1e-5)


@gpu
@triton_here
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=named)
@pytest.mark.parametrize("v", [7, 600 if IS_INTERPRETED else 128256])
def test_the_search_finds_what_the_sort_finds(truncation, v, monkeypatch):
    logits = random_logits(n=5, v=v).to(DEVICE)
    monkeypatch.setenv("RLBENCH_KERNELS", "reference")
    sorted_ones = of_logits(logits, **truncation)
    monkeypatch.setenv("RLBENCH_KERNELS", "triton")
    found = of_logits(logits, **truncation)
    probs = logits.double().softmax(-1)
    masses = [torch.where(logits >= x[:, None], probs, 0.0).sum(-1) for x in (found, sorted_ones)]
    # float32 sums decide which token is the last one; a flat row's tokens have 1e-5 each where there are 128256
    assert (masses[0] - masses[1]).abs().max() < (3e-6 if v < 1000 else 3e-5)


@pytest.mark.skipif(IS_INTERPRETED, reason="the reference")
def test_gradients_with_support_and_lora_pass_gradcheck():
    generator = torch.Generator().manual_seed(2)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    hidden, weight, bias, a, b = leaf(6, 5), leaf(13, 5), leaf(13), leaf(3, 5), leaf(13, 3)
    targets = torch.randint(13, (6,), generator=generator)
    options = {"temperature": 0.8, "softcap": 3.0}
    support = support_thresholds(hidden, weight, bias=bias, lora=Lora(a, b, 0.5), top_p=0.7, **options)

    def op(h, w, bias, a, b):
        return linear_logprobs(h, w, targets, bias=bias, support=support, lora=Lora(a, b, 0.5), **options)

    assert torch.autograd.gradcheck(op, (hidden, weight, bias, a, b))
    frozen = weight.detach(), bias.detach()
    assert torch.autograd.gradcheck(lambda h: op(h, *frozen, a.detach(), b.detach()), (hidden,))
    assert torch.autograd.gradcheck(lambda h: linear_logprobs(h, frozen[0], targets, support=support), (hidden,))


def test_tokens_outside_get_no_gradient_and_the_target_is_always_inside():
    weight = torch.tensor([[0.0], [0.0], [0.0], [0.0]])
    bias = torch.tensor([2.0, 1.0, 0.0, -1.0]).requires_grad_()
    hidden, support = torch.ones(2, 1), torch.tensor([0.5, 0.5])
    targets = torch.tensor([1, 3])
    logprobs, entropy = linear_logprobs(hidden, weight, targets, bias=bias, support=support)
    (grad,) = torch.autograd.grad(logprobs[0] + entropy[0], bias)
    log_total = math.log(math.exp(2) + math.exp(1) + math.exp(-1))
    assert logprobs.tolist() == pytest.approx([1 - math.log(math.exp(2) + math.exp(1)), -1 - log_total])
    assert grad[2:].eq(0).all() and grad[:2].ne(0).all()


def test_the_target_alone_has_probability_1():
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [900.0]])
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([0]), support=torch.tensor([1000.0]))
    assert (float(logprobs), float(entropy)) == (0.0, 0.0)


@pytest.mark.skipif(IS_INTERPRETED, reason="the reference")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_support_of_everything_changes_no_bit(dtype):
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(9, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(40, 16, generator=generator).to(dtype)
    targets = torch.randint(40, (9,), generator=generator)
    found = []
    for support in (None, torch.full((9,), -torch.inf)):
        results = linear_logprobs(hidden, weight, targets, support=support)
        found.append([*results, *torch.autograd.grad(results[0].sum() + results[1].sum(), hidden)])
    assert all(map(torch.equal, *found))


def test_a_lora_pair_equals_the_merged_head():
    generator = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(9, 16, generator=generator), torch.randn(40, 16, generator=generator)
    a, b = torch.randn(3, 16, generator=generator), torch.randn(40, 3, generator=generator)
    targets = torch.randint(40, (9,), generator=generator)
    before = weight.clone()
    found = linear_logprobs(hidden, weight, targets, lora=Lora(a, b, 0.5))
    merged = linear_logprobs(hidden, weight + 0.5 * b @ a, targets)
    thresholds = support_thresholds(hidden, weight, lora=Lora(a, b, 0.5), top_k=4)
    torch.testing.assert_close(found, merged)
    torch.testing.assert_close(thresholds, support_thresholds(hidden, weight + 0.5 * b @ a, top_k=4))
    assert torch.equal(weight, before)


@gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_host_waits_for_nothing():
    hidden = torch.randn(300, 64, device=DEVICE).bfloat16().requires_grad_()
    weight = torch.randn(5000, 64, device=DEVICE).bfloat16()
    lora = Lora(torch.randn(8, 64, device=DEVICE).requires_grad_(), torch.randn(5000, 8, device=DEVICE), 0.1)
    targets = torch.randint(5000, (300,), device=DEVICE)

    def run():
        for chosen in ({}, {"lora": lora}):
            support = support_thresholds(hidden, weight, top_p=0.9, top_k=2000, min_p=1e-6, **chosen)
            options = {"support": support, **chosen}
            linear_logprobs(hidden, weight, targets, **options)[0].sum().backward()
            linear_token_loss(hidden, weight, targets, lambda p, h, c: (p.sum(), {}), {}, **options)[0].backward()

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(IS_INTERPRETED, reason="the reference")
def test_thresholds_do_not_depend_on_the_split_into_chunks(monkeypatch):
    logits = random_logits()
    whole = of_logits(logits, top_p=0.9)
    monkeypatch.setattr(module, "_CPU_ELEMENTS", 2 * logits.shape[1])
    temperature = torch.ones(len(logits))
    assert torch.equal(of_logits(logits, top_p=0.9, temperature=temperature), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"top_k": -1}, "top_k"), ({"top_k": 1.5}, "top_k"),
     ({"min_p": -0.1}, "min_p"), ({"temperature": 0.0}, "temperature"), ({"lora": (1, 2)}, "lora"),
     ({"lora": Lora(torch.ones(2, 5), torch.ones(13, 3), 1.0)}, "lora"), ({"weight": torch.ones(13, 4)}, "hidden")],
)  # fmt: skip
def test_arguments_of_thresholds_that_do_not_fit_are_named(change, message):
    arguments = {"hidden": torch.ones(7, 5), "weight": torch.ones(13, 5), "top_p": 0.9} | change
    with pytest.raises(ValueError, match=message):
        support_thresholds(**arguments)


@pytest.mark.parametrize(
    "support", [torch.zeros(3), torch.zeros(7, dtype=torch.float64), torch.zeros(7).requires_grad_()]
)
def test_a_support_that_does_not_fit_is_named(support):
    with pytest.raises(ValueError, match="support"):
        linear_logprobs(torch.ones(7, 5), torch.ones(13, 5), torch.zeros(7, dtype=torch.int64), support=support)


@on_cpu
def test_kernels_under_the_interpreter():
    run_interpreted(__file__)
