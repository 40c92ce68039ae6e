"""Laws and hand-computed values of the KL estimators."""

import math

import pytest
import torch

from rlbench.algorithms.kl import k3


def test_k3_matches_hand_computed_values():
    logprobs, ref_logprobs = torch.tensor([0.0, -1.0]), torch.tensor([math.log(2.0), -1.0])

    assert k3(logprobs, ref_logprobs).tolist() == pytest.approx([2 - math.log(2.0) - 1, 0.0])


def test_the_mean_of_k3_over_samples_is_the_kl_divergence():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(5, generator=generator).log_softmax(0) for _ in range(2))
    exact = (policy.exp() * (policy - reference)).sum()
    tokens = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=generator)

    assert k3(policy[tokens], reference[tokens]).mean().item() == pytest.approx(exact.item(), rel=0.02)


def test_k3_is_never_negative_and_flat_where_the_policies_agree():
    logprobs = torch.linspace(-5, 0, 11).requires_grad_()

    k3(logprobs, logprobs.detach()).sum().backward()

    assert bool((k3(logprobs, torch.full((11,), -1.0)) >= 0).all())
    torch.testing.assert_close(logprobs.grad, torch.zeros(11))
