"""The Bradley-Terry loss by hand, and against the loss of TRL's RewardTrainer."""

import math
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rlbench.algorithms.reward_losses import bradley_terry
from rlbench.engine.vllm_process import clean_start

with warnings.catch_warnings(), clean_start():  # TRL imports vLLM where it is installed
    warnings.simplefilter("ignore")
    from trl import RewardTrainer


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


@pytest.mark.parametrize("has_margin", [False, True])
@pytest.mark.parametrize("coefficient", [None, 0.05])
def test_value_and_gradient_are_those_of_trl(has_margin, coefficient):
    """TRL's own method; only its model is replaced, by given rewards."""
    torch.manual_seed(3)
    rewards = torch.randn(10, dtype=torch.float64, requires_grad=True)  # five chosen ones, then five rejected ones
    margins = torch.rand(5, dtype=torch.float64) if has_margin else torch.zeros(5, dtype=torch.float64)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {"attention_mask": torch.ones(10, 3)} | ({"margin": margins} if has_margin else {})

    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=rewards[:, None]), inputs)
    ours = bradley_terry(rewards[:5], rewards[5:], margins, centering_coef=coefficient or 0.0).mean()

    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, rewards, retain_graph=True)[0] for loss in (ours, theirs)))
