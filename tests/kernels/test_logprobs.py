"""`logprobs` against float64 softmax and F.cross_entropy."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from rlbench_kernels import logprobs

module = importlib.import_module("rlbench_kernels.logprobs")  # the package's attribute is the function
# of gradients, stored in the dtype; float32 scores near 10 are rounded by 5e-7, and log p with them
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 64)


def inputs(n=7, v=13, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(n, v, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(v, (n,), generator=generator)


def temperatures(n):
    return {"one": 1.0, "number": 0.7, "rows": torch.linspace(0.5, 1.5, n)}


def expected(logits, targets, temperature=1.0):
    rows = temperature.double()[:, None] if isinstance(temperature, torch.Tensor) else temperature
    log_probs = torch.log_softmax(logits.double() / rows, -1)
    return log_probs.gather(1, targets[:, None])[:, 0], torch.special.entr(log_probs.exp()).sum(-1)


def error(actual, exact):
    actual, exact = actual.detach().double(), exact.detach().double()
    return float((actual - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["one", "number", "rows"])
def test_values_and_gradients_match_float64(name, dtype):
    logits, targets = inputs(23, 37, dtype)
    temperature = temperatures(23)[name]
    results = logprobs(logits, targets, temperature=temperature)
    exact_logits = logits.detach().double().requires_grad_()
    exact = expected(exact_logits, targets, temperature)
    for mine, best in zip(results, exact, strict=True):
        assert error(mine, best) < (1e-12 if dtype == torch.float64 else 1e-6)
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, -2.0)):
        g = torch.linspace(-1, 2, 23, dtype=results[0].dtype)
        terms = [w * (r * g).sum() for w, r in zip(weights, results, strict=True) if w]
        (grad,) = torch.autograd.grad(sum(terms), logits, retain_graph=True)
        exact_terms = [w * (r * g).sum() for w, r in zip(weights, exact, strict=True) if w]
        (exact_grad,) = torch.autograd.grad(sum(exact_terms), exact_logits, retain_graph=True)
        assert error(grad, exact_grad) < TOLERANCE[dtype]


def test_gradcheck():
    logits, targets = inputs(5, 7)
    for temperature in (0.7, torch.linspace(0.5, 1.5, 5, dtype=torch.float64)):
        assert torch.autograd.gradcheck(lambda x, t=temperature: logprobs(x, targets, temperature=t), (logits,))


def test_equal_to_cross_entropy_and_logits_are_kept():
    logits, targets = inputs(9, 50, torch.float32)
    before = logits.detach().clone()
    value = -logprobs(logits, targets)[0]
    torch.testing.assert_close(value, F.cross_entropy(logits, targets, reduction="none"))
    value.sum().backward()
    assert torch.equal(logits.detach(), before)


def test_two_tokens_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]]).requires_grad_()
    value, entropy = logprobs(logits, torch.tensor([1]))
    assert value.item() == pytest.approx(math.log(0.75))
    assert entropy.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert grad.tolist()[0] == pytest.approx([-0.25, 0.25])


def test_a_nearly_certain_target_keeps_relative_precision():
    logits = torch.tensor([[0.0, 30.0]]).requires_grad_()
    value, _ = logprobs(logits, torch.tensor([1]))
    assert value.item() == pytest.approx(-math.exp(-30.0), rel=1e-5)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert grad.tolist()[0] == pytest.approx([-math.exp(-30.0), math.exp(-30.0)], rel=1e-5)


def test_tokens_of_probability_0():
    logits = torch.tensor([[1.0, -torch.inf, 2.0], [3.0, -torch.inf, -torch.inf]]).requires_grad_()
    value, entropy = logprobs(logits, torch.tensor([2, 0]))
    (grad,) = torch.autograd.grad((value + entropy).sum(), logits)
    kept = logits.detach()[:, [0, 2]]
    assert value[0].item() == pytest.approx(torch.log_softmax(kept[0], 0)[1].item())
    assert value[1] == 0 and entropy[1] == 0 and grad.isfinite().all() and (grad[:, 1] == 0).all()
    assert logprobs(logits, torch.tensor([1, 0]))[0][0] == -torch.inf


def test_a_row_without_gradient_gets_0_whatever_it_holds():
    logits, targets = inputs(3, 5, torch.float32)
    logits = logits.detach().index_fill(0, torch.tensor(1), torch.nan).requires_grad_()
    value, entropy = logprobs(logits, targets)
    mask = torch.tensor([True, False, True])
    torch.where(mask, value + entropy, 0.0).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and (logits.grad[1] == 0).all()


def test_what_does_not_fit_is_refused():
    logits, targets = inputs()
    with pytest.raises(ValueError, match="targets"):
        logprobs(logits, targets.int())
    with pytest.raises(ValueError, match="temperature"):
        logprobs(logits, targets, temperature=0.0)
    with pytest.raises(ValueError, match="temperature"):
        logprobs(logits, targets, temperature=torch.ones(3))
    with pytest.raises(ValueError, match="logits"):
        logprobs(logits[0], targets)
