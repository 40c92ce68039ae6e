"""The Bradley-Terry loss by hand."""

import math

import pytest
import torch

from rlbench.algorithms.reward_losses import bradley_terry


def test_the_loss_is_minus_the_log_probability_that_the_chosen_one_wins():
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([0.5, 1.0])

    loss = bradley_terry(chosen, rejected, torch.tensor([0.0, 0.25]), centering_coef=0.1)

    first = -math.log(1 / (1 + math.exp(-1.5))) + 0.1 * 2.5**2
    second = -math.log(1 / (1 + math.exp(1.25))) + 0.1 * 1.0
    assert loss.tolist() == pytest.approx([first, second])


def test_without_centering_only_differences_count_and_with_it_scores_are_pulled_to_zero():
    chosen = torch.tensor([5.0], requires_grad=True, dtype=torch.float64)
    rejected = torch.tensor([4.0], requires_grad=True, dtype=torch.float64)
    margins = torch.zeros(1, dtype=torch.float64)

    shifted = bradley_terry(chosen - 7, rejected - 7, margins, centering_coef=0.0)
    torch.testing.assert_close(bradley_terry(chosen, rejected, margins, centering_coef=0.0), shifted)
    gradients = torch.autograd.grad(
        bradley_terry(chosen, rejected, margins, centering_coef=0.5).sum(), (chosen, rejected)
    )
    pull = 1 / (1 + math.exp(1.0))
    assert [float(g) for g in gradients] == pytest.approx([9 - pull, 9 + pull])
