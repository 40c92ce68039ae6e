"""Values and gradients of the KL estimators against exact sums over a small vocabulary."""

import math

import pytest
import torch

from rlbench.algorithms import KL_ESTIMATORS
from rlbench.algorithms.kl import k1, k2, k3, k3_unbiased


def distributions(seed: int = 0):
    """Policy logits with gradient, old policy and reference logprobs over five tokens, float64."""
    generator = torch.Generator().manual_seed(seed)
    logits, old, reference = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3))
    return logits.requires_grad_(), old.log_softmax(0), reference.log_softmax(0)


def expected_gradient(estimator, logits, sampler, old, reference) -> torch.Tensor:
    """Gradient of E_sampler[estimator], token probabilities of the sampler held fixed."""
    logprobs = logits.log_softmax(0)
    loss = (sampler.exp().detach() * estimator(logprobs, reference, old)).sum()
    return torch.autograd.grad(loss, logits)[0]


def exact_gradient(logits, reference) -> torch.Tensor:
    policy = logits.log_softmax(0)
    return torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)[0]


def test_values_match_hand_computed_ones():
    logprobs, ref, old = torch.tensor([0.0, -1.0]), torch.tensor([math.log(2.0), -1.0]), torch.tensor([-1.0, -1.0])
    d = -math.log(2.0)

    assert k1(logprobs, ref, old).tolist() == pytest.approx([d, 0.0])
    assert k2(logprobs, ref, old).tolist() == pytest.approx([d * d / 2, 0.0])
    assert k3(logprobs, ref, old).tolist() == pytest.approx([2 + d - 1, 0.0])
    assert k3_unbiased(logprobs, ref, old).tolist() == pytest.approx([math.e * (2 + d - 1), 0.0])


@pytest.mark.parametrize("name", ["k1", "k3", "k3_unbiased"])
def test_the_mean_over_tokens_of_the_policy_is_the_kl_divergence(name):
    logits, _, reference = distributions()
    policy = logits.log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()

    torch.testing.assert_close((policy.exp() * KL_ESTIMATORS[name](policy, reference, policy)).sum(), exact)


@pytest.mark.parametrize("name", ["k1", "k2", "k3_unbiased"])
def test_the_gradient_on_policy_is_that_of_the_kl_to_the_reference(name):
    logits, _, reference = distributions(1)
    policy = logits.log_softmax(0).detach()

    gradient = expected_gradient(KL_ESTIMATORS[name], logits, policy, policy, reference)

    torch.testing.assert_close(gradient, exact_gradient(logits, reference))


def test_k3_as_a_loss_follows_the_kl_from_the_reference():
    logits, _, reference = distributions(2)
    policy = logits.log_softmax(0).detach()
    forward = (reference.exp() * (reference - logits.log_softmax(0))).sum()

    gradient = expected_gradient(k3, logits, policy, policy, reference)

    torch.testing.assert_close(gradient, torch.autograd.grad(forward, logits)[0])
    assert (gradient - exact_gradient(logits, reference)).abs().max() > 0.05


def test_k3_unbiased_stays_right_when_the_policy_has_moved():
    logits, old, reference = distributions(3)

    right = expected_gradient(k3_unbiased, logits, old, old, reference)
    wrong = expected_gradient(k3, logits, old, old, reference)

    torch.testing.assert_close(right, exact_gradient(logits, reference))
    assert (wrong - right).abs().max() > 0.05


def test_a_naive_k1_would_have_no_gradient_at_all():
    logits, _, reference = distributions(4)
    policy = logits.log_softmax(0).detach()

    naive = expected_gradient(lambda logprobs, ref, old: logprobs - ref, logits, policy, policy, reference)

    torch.testing.assert_close(naive, torch.zeros_like(naive), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_every_estimator_is_zero_and_flat_where_the_policies_agree(name):
    logprobs = torch.linspace(-5, 0, 11).requires_grad_()
    value = KL_ESTIMATORS[name](logprobs, logprobs.detach(), logprobs.detach())

    value.sum().backward()

    torch.testing.assert_close(value, torch.zeros(11))
    torch.testing.assert_close(logprobs.grad, torch.zeros(11))


def test_k2_and_k3_are_never_negative():
    logprobs = torch.linspace(-5, 0, 11)
    reference = torch.full((11,), -1.0)

    assert bool((k2(logprobs, reference, logprobs) >= 0).all() and (k3(logprobs, reference, logprobs) >= 0).all())
