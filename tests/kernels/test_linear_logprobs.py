"""`linear_logprobs` and `linear_token_loss` against float64 softmax over full logits."""

import pytest
import torch

import rlbench_kernels.linear_logprobs_reference as reference
from rlbench_kernels import linear_logprobs, linear_token_loss
from rlbench_kernels.linear_logprobs_head import accumulation_dtype

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "row temperature": {"temperature": "rows"},
    "softcap": {"softcap": 3.0},
    "bias": {"bias": True},
    "all": {"temperature": "rows", "softcap": 3.0, "bias": True},
}
# relative Frobenius error against float64; bfloat16 logits are rounded on CPU
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 64)


def inputs(n=7, d=5, v=13, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(v, (n,), generator=generator)


def options(name, n, v, dtype=torch.float64):
    chosen = dict(OPTIONS[name])
    if chosen.get("temperature") == "rows":
        chosen["temperature"] = torch.linspace(0.5, 1.5, n, dtype=accumulation_dtype(dtype))
    if chosen.get("bias"):
        chosen["bias"] = torch.linspace(-1, 1, v, dtype=torch.float64).to(dtype)
    return chosen


def expected(hidden, weight, targets, temperature=1.0, softcap=None, bias=None):
    scores = hidden.double() @ weight.double().T
    if bias is not None:
        scores = scores + bias.double()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores / (temperature.double()[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    log_probs = torch.log_softmax(scores, -1)
    return log_probs.gather(1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def error(actual, exact):
    actual, exact = actual.detach().double(), exact.detach().double()
    return float((actual - exact).norm() / exact.norm())


def clipped_loss(logprobs, entropy, columns):
    ratio = torch.exp(torch.where(columns["mask"], logprobs - columns["old"], 0.0))
    advantages = columns["advantages"]
    per_token = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    loss = torch.where(columns["mask"], per_token - columns["entropy_coef"] * entropy, 0.0).sum()
    return loss, {"entropy": entropy.sum(), "logprob_max": logprobs.max()}


def columns(n, entropy_coef=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return {
        "advantages": torch.randn(n, generator=generator, dtype=dtype),
        "old": -2.0 + 0.1 * torch.randn(n, generator=generator, dtype=dtype),
        "mask": torch.arange(n) % 3 != 1,
        "entropy_coef": torch.full((n,), entropy_coef, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_match_float64(name, dtype):
    hidden, weight, targets = inputs(n=23, d=16, v=37, dtype=dtype)
    chosen = options(name, 23, 37, dtype)
    results = linear_logprobs(hidden, weight, targets, **chosen)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = expected(exact_hidden, weight, targets, **chosen)
    for weights in ((1.0, 0.0), (0.5, -2.0)):
        g = torch.linspace(-1, 1, 23, dtype=results[0].dtype)
        terms = [w * (r * g).sum() for w, r in zip(weights, results, strict=True) if w]
        (grad,) = torch.autograd.grad(sum(terms), hidden, retain_graph=True)
        exact_terms = [w * (r * g).sum() for w, r in zip(weights, exact, strict=True) if w]
        (exact_grad,) = torch.autograd.grad(sum(exact_terms), exact_hidden, retain_graph=True)
        assert error(grad, exact_grad) < TOLERANCE[dtype]
    for result, exact_result in zip(results, exact, strict=True):
        assert error(result, exact_result) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["plain", "all"])
def test_gradcheck_of_hidden_weight_and_bias(name):
    hidden, weight, targets = inputs()
    chosen = options(name, 7, 13)
    bias = chosen.pop("bias", torch.zeros(13, dtype=torch.float64)).requires_grad_()

    def op(h, w, b):
        return linear_logprobs(h, w, targets, bias=b, **chosen)

    assert torch.autograd.gradcheck(op, (hidden, weight.requires_grad_(), bias))
    assert torch.autograd.gradcheck(lambda h: op(h, weight.detach(), None), (hidden,))


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("is_trained", [False, True])
def test_token_loss_equals_autograd_through_linear_logprobs(entropy_coef, is_trained):
    hidden, weight, targets = inputs(n=11)
    weight.requires_grad_(is_trained)
    parts = columns(11, entropy_coef)
    loss, metrics, logprobs = linear_token_loss(hidden, weight, targets, clipped_loss, parts, temperature=0.7)
    grads = torch.autograd.grad(loss * 3, [hidden, weight] if is_trained else [hidden])
    exact = expected(hidden, weight, targets, temperature=0.7)
    exact_loss, exact_metrics = clipped_loss(*exact, parts)
    exact_grads = torch.autograd.grad(exact_loss * 3, [hidden, weight] if is_trained else [hidden])
    torch.testing.assert_close(loss, exact_loss)
    torch.testing.assert_close(logprobs, exact[0].detach())
    assert metrics.keys() == exact_metrics.keys()
    for key, value in metrics.items():
        torch.testing.assert_close(value, exact_metrics[key].detach())
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad, exact_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_path_no_gradient_path_and_token_loss_give_the_same_bits(dtype):
    hidden, weight, targets = inputs(n=19, d=16, v=41, dtype=dtype)
    with_gradient = linear_logprobs(hidden, weight, targets, temperature=0.9)
    with torch.no_grad():
        without = linear_logprobs(hidden, weight, targets, temperature=0.9)
    _, _, of_loss = linear_token_loss(hidden, weight, targets, lambda p, h, c: (p.sum(), {}), {}, temperature=0.9)
    assert torch.equal(with_gradient[0], without[0]) and torch.equal(with_gradient[1], without[1])
    assert torch.equal(of_loss, without[0])


def test_result_does_not_depend_on_the_split_into_chunks(monkeypatch):
    hidden, weight, targets = inputs(n=17)
    parts = columns(17, 0.1)
    results = []
    for elements in (1, 13 * 4, 13 * 17, 10_000):
        monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", elements)
        loss, metrics, logprobs = linear_token_loss(hidden, weight, targets, clipped_loss, parts)
        results.append((loss, metrics["entropy"], metrics["logprob_max"], logprobs,
                        *torch.autograd.grad(loss, hidden)))  # fmt: skip
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("n", [0, 1])
def test_no_row_and_one_row(n):
    hidden, weight, targets = inputs(n=n)
    logprobs, entropy = linear_logprobs(hidden, weight, targets)
    (logprobs.sum() + entropy.sum()).backward()
    loss, _, _ = linear_token_loss(hidden, weight, targets, clipped_loss, columns(n))
    loss.backward()
    assert logprobs.shape == entropy.shape == (n,) and hidden.grad is not None and hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("is_trained", [False, True])
def test_masked_rows_may_hold_anything(value, entropy_coef, is_trained):
    hidden, weight, targets = inputs(n=11)
    parts = columns(11, entropy_coef)
    weight.requires_grad_(is_trained)
    tensors = [hidden, weight] if is_trained else [hidden]

    def masked_loss(logprobs, entropy, c):
        loss, _ = clipped_loss(torch.where(c["mask"], logprobs, 0.0), torch.where(c["mask"], entropy, 0.0), c)
        return loss, {}

    clean = torch.autograd.grad(linear_token_loss(hidden, weight, targets, masked_loss, parts)[0], tensors)
    poisoned = torch.where(parts["mask"][:, None], hidden.detach(), value).requires_grad_()
    tensors[0] = poisoned
    dirty = torch.autograd.grad(linear_token_loss(poisoned, weight, targets, masked_loss, parts)[0], tensors)
    torch.testing.assert_close(dirty, clean)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"temperature": 0.0}, "temperature"), ({"softcap": -1.0}, "softcap"), ({"bias": torch.ones(3)}, "bias"),
     ({"temperature": torch.ones(3)}, "temperature"), ({"targets": torch.zeros(7)}, "targets"),
     ({"weight": torch.ones(13, 5)}, "dtype"), ({"weight": torch.ones(13, 4)}, "hidden")],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named(change, message):
    hidden, weight, targets = inputs()
    arguments = {"hidden": hidden, "weight": weight, "targets": targets} | change
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**arguments)


def test_column_of_wrong_length_is_named():
    hidden, weight, targets = inputs()
    with pytest.raises(ValueError, match="'advantages'"):
        linear_token_loss(hidden, weight, targets, clipped_loss, {"advantages": torch.ones(3)})
