"""`grad="sparse"` against the gradient of float64 softmax over full logits, and against `grad="dense"`."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rlbench_kernels.linear_logprobs_reference as reference
from rlbench_kernels import Lora, SparseGradient, linear_logprobs, linear_token_loss
from tests.kernels.interpreter import IS_INTERPRETED
from tests.kernels.test_linear_logprobs import OPTIONS, clipped_loss, columns, error, expected, inputs, options

pytestmark = pytest.mark.skipif(IS_INTERPRETED, reason="the reference")


def llm_inputs(n=300, d=64, v=8192, dtype=torch.float32, num_runs=3):
    """As `peaked_hidden` of bench_linear_logprobs, 1.5 nats; rows of one text share most of their candidates."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(v, d, generator=generator) / d**0.5).to(dtype)
    zipf = 1.0 / torch.arange(1, v + 1)
    scores = 17.0 - 2.0 * torch.arange(1, 65).log()
    texts = [torch.multinomial(zipf, 64, generator=generator) for _ in range(num_runs)]
    order = torch.stack([torch.randperm(64, generator=generator) for _ in range(n)])
    candidates = torch.stack([texts[i * num_runs // n] for i in range(n)]).gather(1, order)
    rows = weight[candidates].float()
    hidden = torch.einsum("k,nkd->nd", scores / 2.2 / rows.square().sum(-1).mean(), rows)
    logits = hidden @ weight.float().T
    hidden = hidden * (17.0 / logits.amax(-1).mean())
    targets = torch.multinomial((hidden @ weight.float().T).softmax(-1), 1, generator=generator)[:, 0]
    return hidden.to(dtype).requires_grad_(), weight, targets


def policy_loss(logprobs, entropy, parts):
    return clipped_loss(logprobs, entropy.detach(), parts)


def gradient(hidden, weight, targets, row_grads, **chosen):
    logprobs, _ = linear_logprobs(hidden, weight, targets, **chosen)
    return torch.autograd.grad((logprobs * row_grads.to(logprobs.dtype)).sum(), hidden)[0]


def exact_gradient(hidden, weight, targets, row_grads, **chosen):
    hidden = hidden.detach().double().requires_grad_()
    logprobs, _ = expected(hidden, weight, targets, **chosen)
    return torch.autograd.grad((logprobs * row_grads.double()).sum(), hidden)[0]


def block_errors(actual, exact, size=128):
    """Relative errors of the sums over blocks, and of the sum over all rows."""
    pairs = [*zip(actual.split(size), exact.split(size), strict=True), (actual, exact)]
    return [error(a.double().sum(0), e.sum(0)) for a, e in pairs]


def weighted_errors(actual, exact, size=128):
    """Errors of the sums over blocks of rows that already carry their gradient, over the sum of the rows' norms."""
    difference = actual.double() - exact
    return [float(d.sum(0).norm() / e.norm(dim=1).sum()) for d, e in
            zip(difference.split(size), exact.split(size), strict=True)]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_values_have_the_bits_of_the_dense_mode(name, dtype, monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 37 * 9)
    hidden, weight, targets = inputs(n=23, d=16, v=37, dtype=dtype)
    chosen = options(name, 23, 37, dtype)
    dense = linear_logprobs(hidden, weight, targets, **chosen)
    sparse = linear_logprobs(hidden, weight, targets, **chosen, grad="sparse")
    assert torch.equal(sparse[0], dense[0]) and torch.equal(sparse[1], dense[1])
    parts = columns(23, dtype=dense[0].dtype)
    loss, metrics, logprobs = linear_token_loss(hidden, weight, targets, policy_loss, parts, **chosen)
    others = linear_token_loss(hidden, weight, targets, policy_loss, parts, **chosen, grad="sparse")
    assert torch.equal(others[0], loss) and torch.equal(others[2], logprobs)
    assert all(torch.equal(others[1][name], value) for name, value in metrics.items())


def test_hand_computed_gradient():
    probs = torch.tensor([[0.5, 0.44, 0.04, 0.02], [0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    hidden, weight = probs.log().requires_grad_(), torch.eye(4, dtype=torch.float64)
    targets, ones = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    # above 0.01 are columns 1, 2 and 3; the target's probability is left out of all sums
    every = SparseGradient(eps=0.01, max_kept_frac=1.0)
    found = gradient(hidden, weight, targets, ones, grad="sparse", sparse=every)
    torch.testing.assert_close(found, torch.tensor([[0.5, -0.44, -0.04, -0.02], [0.5, -0.3, -0.15, -0.05]]).double())
    # above 0.2 is column 1 alone; tail masses 0.06 and 0.2, shared vector (0.19, 0.07) / 0.26
    one = SparseGradient(eps=0.2)
    found = gradient(hidden, weight, targets, ones, grad="sparse", sparse=one)
    first = [0.5, -0.44, -0.06 * 0.19 / 0.26, -0.06 * 0.07 / 0.26]
    second = [0.5, -0.3, -0.2 * 0.19 / 0.26, -0.2 * 0.07 / 0.26]
    torch.testing.assert_close(found, torch.tensor([first, second], dtype=torch.float64), atol=0, rtol=1e-12)
    assert one.stats is not None and every.stats is not None
    assert [float(value) for value in one.stats] == pytest.approx([0.25, 0.13, 0.2, 0.0])
    assert [float(value) for value in every.stats] == pytest.approx([0.75, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("n", [128, 300, 385])
def test_error_is_small_and_sums_are_unbiased_on_logits_of_a_language_model(n):
    hidden, weight, targets = llm_inputs(n)
    sparse = SparseGradient()
    ones = torch.ones(n)
    found = gradient(hidden, weight, targets, ones, grad="sparse", sparse=sparse)
    exact = exact_gradient(hidden, weight, targets, ones)
    assert sparse.stats is not None and float(sparse.stats.fallback_frac) == 0
    assert 0.001 < float(sparse.stats.kept_frac) < 0.3 and float(sparse.stats.tail_mass) > 1e-3
    assert 1e-5 < error(found, exact) < 2e-3
    assert max(block_errors(found, exact)) < 1e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_stay_within_the_bound_and_sums_are_unbiased_with_every_option(name):
    hidden, weight, targets = llm_inputs(200, v=2000, dtype=torch.float64)
    chosen = options(name, 200, 2000)
    if "softcap" in chosen:
        chosen["softcap"] = 30.0
    sparse = SparseGradient(eps=1e-3)
    found = gradient(hidden, weight, targets, torch.ones(200), **chosen, grad="sparse", sparse=sparse)
    exact = exact_gradient(hidden, weight, targets, torch.ones(200), **chosen)
    assert sparse.stats is not None and float(sparse.stats.fallback_frac) == 0
    assert error(found, exact) > 1e-6
    assert max(block_errors(found, exact)) < 1e-12
    highest = 2 * float(sparse.stats.tail_mass_max) * float(weight.norm(dim=1).max())
    temperature = torch.as_tensor(chosen.get("temperature", 1.0))
    assert ((found - exact).norm(dim=1) * temperature).max() < highest


def test_smaller_eps_keeps_more_and_errs_less():
    hidden, weight, targets = llm_inputs(256)
    exact = exact_gradient(hidden, weight, targets, torch.ones(256))
    results = []
    for eps in (1e-3, 2.4e-4, 6e-5):
        sparse = SparseGradient(eps=eps)
        found = gradient(hidden, weight, targets, torch.ones(256), grad="sparse", sparse=sparse)
        assert sparse.stats is not None
        results.append((float(sparse.stats.kept_frac), -float(sparse.stats.tail_mass), -error(found, exact)))
    assert results[0] < results[1] < results[2]
    assert [r[2] for r in results] == sorted(r[2] for r in results)


def test_row_weights_of_both_signs_make_their_own_sums_unbiased():
    hidden, weight, targets = llm_inputs(256)
    advantages = torch.randn(256, generator=torch.Generator().manual_seed(3))
    exact = exact_gradient(hidden, weight, targets, advantages)
    found = [
        gradient(hidden, weight, targets, 3.0 * advantages, grad="sparse", sparse=SparseGradient(row_weights=w)) / 3.0
        for w in (advantages, None)
    ]
    assert max(weighted_errors(found[0], exact)) < 1e-6 < max(weighted_errors(found[1], exact))


def test_token_loss_weighs_rows_by_the_gradients_of_the_loss():
    hidden, weight, targets = llm_inputs(256)
    parts = columns(256, dtype=torch.float32)
    with torch.no_grad():
        parts["old"] = linear_logprobs(hidden, weight, targets)[0] + 0.3 * parts["advantages"].roll(1)
    found, exact = (
        torch.autograd.grad(linear_token_loss(h, w, targets, policy_loss, parts, grad=g)[0] * 3, h)[0]
        for h, w, g in (
            (hidden, weight, "sparse"),
            (hidden.detach().double().requires_grad_(), weight.double(), "dense"),
        )
    )
    assert 1e-5 < error(found, exact) < 4e-3
    assert max(weighted_errors(found, exact)) < 1e-6
    assert (found[~parts["mask"]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_flat_logits_fall_back_to_the_dense_gradient(dtype):
    hidden, weight, targets = inputs(n=140, d=16, v=300, dtype=dtype)
    sparse = SparseGradient()
    ones = torch.ones(140)
    found = gradient(hidden, weight, targets, ones, grad="sparse", sparse=sparse)
    dense = gradient(hidden, weight, targets, ones)
    assert error(found, dense) < {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 1e-3}[dtype]
    assert sparse.stats is not None and [float(value) for value in sparse.stats] == [1.0, 0.0, 0.0, 1.0]


def test_one_flat_block_falls_back_alone():
    hidden, weight, targets = llm_inputs(256)
    mixed = torch.cat([hidden.detach()[:128], 0.01 * hidden.detach()[128:]]).requires_grad_()
    sparse = SparseGradient(max_kept_frac=0.6)
    found = gradient(mixed, weight, targets, torch.ones(256), grad="sparse", sparse=sparse)
    dense = gradient(mixed, weight, targets, torch.ones(256))
    assert sparse.stats is not None and float(sparse.stats.fallback_frac) == 0.5
    assert error(found[128:], dense[128:]) < 1e-6 < error(found[:128], dense[:128])


@pytest.mark.parametrize("n", [0, 1, 127, 129])
def test_any_number_of_rows(n):
    hidden, weight, targets = llm_inputs(max(n, 1))
    hidden, targets = hidden.detach()[:n].requires_grad_(), targets[:n]
    sparse = SparseGradient()
    found = gradient(hidden, weight, targets, torch.ones(n), grad="sparse", sparse=sparse)
    assert found.shape == hidden.shape and sparse.stats is not None
    assert all(math.isfinite(value) for value in sparse.stats)
    if n:
        assert max(block_errors(found, exact_gradient(hidden, weight, targets, torch.ones(n)))) < 1e-5


@pytest.mark.parametrize("value", [-math.inf, math.nan])
@pytest.mark.parametrize("is_loss", [False, True])
def test_masked_rows_may_hold_anything_and_others_do_not_feel_it(value, is_loss):
    hidden, weight, targets = llm_inputs(150)
    is_kept = torch.arange(150) % 3 != 1
    row_grads = torch.where(is_kept, torch.linspace(-1, 1, 150), 0.0)
    clean = hidden.detach()
    poisoned = torch.where(is_kept[:, None], clean, value)

    def of(rows):
        rows = rows.clone().requires_grad_()
        if not is_loss:
            sparse = SparseGradient(row_weights=row_grads)
            return gradient(rows, weight, targets, row_grads, grad="sparse", sparse=sparse)
        loss, _, _ = linear_token_loss(
            rows, weight, targets, lambda p, h, c: (torch.where(c["g"] != 0, p * c["g"], 0.0).sum(), {}),
            {"g": row_grads}, grad="sparse",
        )  # fmt: skip
        return torch.autograd.grad(loss, rows)[0]

    found = of(poisoned)
    assert torch.equal(found, of(clean)) and (found[~is_kept] == 0).all()
    exact = exact_gradient(clean, weight, targets, row_grads)
    assert max(weighted_errors(found, exact)) < 1e-6


def test_a_row_declared_without_weight_that_gets_a_gradient_is_nan():
    hidden, weight, targets = llm_inputs(3)
    sparse = SparseGradient(row_weights=torch.tensor([1.0, 0.0, 1.0]))
    found = gradient(hidden, weight, targets, torch.ones(3), grad="sparse", sparse=sparse)
    assert found.isnan().all(1).tolist() == [False, True, False]


def test_no_tensor_holds_all_logits(monkeypatch):
    class Largest(TorchDispatchMode):
        num_elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.num_elements = max(self.num_elements, tensor.numel())
            return result

    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 2000 * 40)
    hidden, weight, targets = llm_inputs(400, d=16, v=2000)
    with Largest() as largest:
        linear_logprobs(hidden, weight, targets, grad="sparse")[0].sum().backward()
    assert 2000 * 40 <= largest.num_elements < 400 * 2000 // 4


@pytest.mark.parametrize(
    ("change", "message"),
    [({"grad": "filtered"}, "grad: 'dense' or 'sparse'"), ({"sparse": SparseGradient()}, "need grad='sparse'"),
     ({"grad": "sparse", "sparse": 6e-5}, "SparseGradient expected, got float"),
     ({"grad": "sparse", "lora": Lora(torch.ones(2, 5), torch.ones(13, 2), 1.0)}, "frozen head, got a LoRA pair"),
     ({"grad": "sparse", "bias": torch.ones(13).requires_grad_()}, "frozen head, got weight or bias"),
     ({"grad": "sparse", "support": torch.zeros(7)}, "does not take a support"),
     ({"grad": "sparse", "sparse": SparseGradient(row_weights=torch.ones(3))}, r"floating \[7\] on cpu"),
     ({"grad": "sparse", "sparse": SparseGradient(row_weights=torch.ones(7, device="meta"))}, "on meta"),
     ({"grad": "sparse", "sparse": SparseGradient(row_weights=torch.ones(7).long())}, "got torch.int64")],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named(change, message):
    hidden, weight, targets = inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_logprobs(hidden, weight, targets, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"eps": 1.0}, "eps .* got 1.0"), ({"eps": -1e-5}, "eps"), ({"block_rows": 0}, "block_rows .* got 0"),
     ({"max_kept_frac": 1.5}, "max_kept_frac .* got 1.5")],
)  # fmt: skip
def test_options_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SparseGradient(**change)


def test_a_gradient_through_the_entropy_and_weights_beside_a_loss_are_refused():
    hidden, weight, targets = inputs()
    _, entropy = linear_logprobs(hidden, weight, targets, grad="sparse")
    with pytest.raises(ValueError, match="no gradient to the entropy"):
        entropy.sum().backward()
    with pytest.raises(ValueError, match="no gradient to the entropy"):
        linear_token_loss(hidden, weight, targets, lambda p, h, c: (h.sum(), {}), {}, grad="sparse")
    sparse = SparseGradient(row_weights=torch.ones(7))
    with pytest.raises(ValueError, match="row_weights .* None expected"):
        linear_token_loss(hidden, weight, targets, policy_loss, columns(7), grad="sparse", sparse=sparse)
