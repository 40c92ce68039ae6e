"""Laws and hand-computed values of the policy losses."""

import math

import pytest
import torch

from rlbench.algorithms.policy_losses import LossInputs, clipped_surrogate


def make_inputs(logprobs, old_logprobs, advantages, mask, num_loss_tokens=None) -> LossInputs:
    loss_mask = torch.tensor(mask)
    return LossInputs(
        logprobs=torch.tensor(logprobs, requires_grad=True),
        old_logprobs=torch.tensor(old_logprobs),
        advantages=torch.tensor(advantages),
        loss_mask=loss_mask,
        num_loss_tokens=num_loss_tokens or int(loss_mask.sum()),
    )


def test_clipped_surrogate_matches_hand_computed_values():
    ratios = [1.5, 0.5, 1.5]
    inputs = make_inputs([math.log(r) for r in ratios], [0.0] * 3, [1.0, 1.0, -1.0], [True] * 3)

    out = clipped_surrogate(inputs, clip_ratio_low=0.2, clip_ratio_high=0.2)

    assert out.loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5) / 3)
    assert out.metrics["loss/clip_frac"].item() == pytest.approx(1 / 3)


def test_loss_does_not_depend_on_the_microbatch_split():
    generator = torch.Generator().manual_seed(0)
    logprobs, old, advantages = (torch.randn(10, generator=generator).tolist() for _ in range(3))
    mask = [True, False] * 5
    options = dict(clip_ratio_low=0.2, clip_ratio_high=0.28)

    whole = clipped_surrogate(make_inputs(logprobs, old, advantages, mask), **options).loss
    parts = [
        clipped_surrogate(make_inputs(logprobs[s], old[s], advantages[s], mask[s], num_loss_tokens=5), **options).loss
        for s in (slice(0, 3), slice(3, 10))
    ]

    torch.testing.assert_close(sum(parts), whole)


def test_on_policy_gradient_is_reinforce():
    inputs = make_inputs([-1.0, -2.0], [-1.0, -2.0], [0.5, -3.0], [True, True])

    clipped_surrogate(inputs, clip_ratio_low=0.2, clip_ratio_high=0.2).loss.backward()

    torch.testing.assert_close(inputs.logprobs.grad, torch.tensor([-0.25, 1.5]))


def test_a_masked_token_with_infinite_logprob_gets_zero_gradient_not_nan():
    inputs = make_inputs([-1.0, float("-inf")], [-1.0, -1.0], [1.0, 1.0], [True, False])

    clipped_surrogate(inputs, clip_ratio_low=0.2, clip_ratio_high=0.2).loss.backward()

    torch.testing.assert_close(inputs.logprobs.grad, torch.tensor([-1.0, 0.0]))


def test_a_shape_mismatch_names_the_field_and_both_shapes():
    inputs = make_inputs([-1.0, -1.0], [-1.0], [1.0, 1.0], [True, True])

    with pytest.raises(ValueError, match=r"old_logprobs has shape \(1,\), expected \(2,\)"):
        clipped_surrogate(inputs, clip_ratio_low=0.2, clip_ratio_high=0.2)
