"""Laws of all policy losses, and hand-computed numbers of each."""

import inspect
import math
from dataclasses import replace

import pytest
import torch

from rlbench.algorithms import POLICY_LOSSES, SELECTIONS
from rlbench.algorithms.loss_inputs import LossInputs
from rlbench.config.algorithm import LOSSES, AlgorithmConfig
from tests.algorithms.batches import Batch, gradient, loss_inputs, make_batch, totals_of

NAMES = list(POLICY_LOSSES)


def evaluate(name: str, inputs: LossInputs, **options):
    return POLICY_LOSSES[name](inputs, **{**LOSSES[name].options, **options})


def inputs_of(ratios: list[float], advantages: list[float], lengths: list[int] | None = None, **changes) -> LossInputs:
    """Old logprobs 0, so that the ratios are given; mean over tokens, or over sequences where lengths are given."""
    n = len(ratios)
    lengths = lengths or [n]
    ids = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)])
    by_length = torch.tensor([1 / (len(lengths) * length) for length in lengths for _ in range(length)])
    return replace(
        LossInputs(
            logprobs=torch.tensor([math.log(r) for r in ratios], requires_grad=True),
            old_logprobs=torch.zeros(n),
            sampling_logprobs=torch.zeros(n),
            advantages=torch.tensor(advantages),
            loss_mask=torch.ones(n, dtype=torch.bool),
            weights=by_length,
            sequence_ids=ids,
            num_sequences=len(lengths),
            num_loss_tokens=n,
            is_selected=torch.zeros(n, dtype=torch.bool),
        ),
        **changes,
    )


def test_every_loss_of_the_config_has_a_function_with_just_its_options():
    assert set(POLICY_LOSSES) == set(LOSSES)
    for name, function in POLICY_LOSSES.items():
        keywords = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert keywords == set(LOSSES[name].options), name
        assert keywords <= set(AlgorithmConfig.__dataclass_fields__), name
        assert LOSSES[name].needs_selection == (name in SELECTIONS), name
        assert AlgorithmConfig(loss=name).loss_options() == dict(LOSSES[name].options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("normalization", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_the_split_into_microbatches_does_not_change_value_or_gradient(name, normalization):
    batch = make_batch(0, with_holes=True)
    totals = totals_of(batch)
    whole = evaluate(name, loss_inputs(batch, normalization)).loss
    parts = [loss_inputs(batch.rows(rows), normalization, totals) for rows in ([0, 1], [2], [3, 4, 5])]
    split = torch.stack([evaluate(name, part).loss for part in parts]).sum()

    expected = gradient(whole, batch)

    torch.testing.assert_close(split, whole)
    torch.testing.assert_close(gradient(split, batch), expected)
    assert expected.abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_sequences_does_not_matter(name):
    batch = make_batch(1)
    order = [3, 5, 0, 4, 2, 1]

    one, other = (evaluate(name, loss_inputs(b, "sequence_mean")).loss for b in (batch, batch.rows(order)))

    torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradient(one, batch), gradient(other, batch))


@pytest.mark.parametrize("name", NAMES)
def test_the_on_policy_gradient_is_that_of_reinforce(name):
    batch = make_batch(2, spread=0.0)
    loss = evaluate(name, loss_inputs(batch, "sequence_mean")).loss
    length = batch.mask.sum(1, keepdim=True)
    expected = -batch.advantages[:, None] / (length * len(batch.mask)) * batch.mask
    if name == "sequence_surrogate":  # the completion is one action: the ratio of the whole product
        expected = expected * length

    torch.testing.assert_close(gradient(loss, batch), expected)


@pytest.mark.parametrize("name", NAMES)
def test_without_advantage_there_is_no_gradient(name):
    batch = replace(make_batch(3), advantages=torch.zeros(6))

    loss = evaluate(name, loss_inputs(batch, "token_mean")).loss

    assert loss.item() == 0
    assert gradient(loss, batch).abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_masked_tokens_count_nothing_even_if_they_are_infinite(name):
    batch = make_batch(4, with_holes=True)
    clean = evaluate(name, loss_inputs(batch, "token_mean"))
    poisoned = batch.logprobs.detach().masked_fill(~batch.mask, float("-inf")).requires_grad_()
    other = replace(batch, logprobs=poisoned)
    dirty = evaluate(name, loss_inputs(other, "token_mean"))

    torch.testing.assert_close(dirty.loss, clean.loss)
    torch.testing.assert_close(gradient(dirty.loss, other), gradient(clean.loss, batch))
    for key, value in clean.metrics.items():
        torch.testing.assert_close(dirty.metrics[key], value, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_mismatch_names_the_field_and_both_shapes(name):
    inputs = inputs_of([1.0, 1.0], [1.0, 1.0], old_logprobs=torch.zeros(1))

    with pytest.raises(ValueError, match=r"old_logprobs has shape \(1,\), expected \(2,\)"):
        evaluate(name, inputs)


def test_clipped_surrogate_matches_hand_computed_values():
    out = evaluate("clipped_surrogate", inputs_of([1.5, 0.5, 1.5], [1.0, 1.0, -1.0]))

    assert out.loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5) / 3)
    assert out.metrics["loss/clip_frac"].item() == pytest.approx(1 / 3)


def test_clip_higher_lets_a_good_token_rise_further():
    inputs = inputs_of([1.25], [1.0])

    assert evaluate("clipped_surrogate", inputs, clip_ratio_high=0.28).loss.item() == pytest.approx(-1.25)
    assert evaluate("clipped_surrogate", inputs, clip_ratio_high=0.2).loss.item() == pytest.approx(-1.2)


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 2.9, 3.1, 50.0])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_one_cap_of_the_ratio_is_both_the_dual_clip_and_the_two_sided_clip(ratio, advantage):
    low, high, cap = 0.2, 0.2, 3.0
    surrogate = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    dual = max(surrogate, cap * advantage) if advantage < 0 else surrogate  # arXiv:1912.09729
    two_sided = min(min(ratio, cap) * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)  # arXiv:2505.07291
    inputs = inputs_of([ratio], [advantage])

    out = evaluate("clipped_surrogate", inputs, clip_ratio_max=cap)

    assert out.loss.item() == pytest.approx(-dual, rel=1e-5) == pytest.approx(-two_sided, rel=1e-5)
    out.loss.backward()
    assert (inputs.logprobs.grad.item() == 0) == bool(out.metrics["loss/clip_frac"].item())


def test_cispo_cuts_the_ratio_and_keeps_the_gradient():
    inputs = inputs_of([8.0, 0.1], [1.0, -2.0])
    evaluate("cispo", inputs, clip_ratio_max=5.0).loss.backward()

    torch.testing.assert_close(inputs.logprobs.grad, torch.tensor([-5.0 / 2, 0.1 * 2 / 2]))


def test_sapo_matches_hand_computed_values():
    inputs = inputs_of([2.0, 2.0], [1.0, -1.0])
    out = evaluate("sapo", inputs, gate_temperature_pos=1.0, gate_temperature_neg=2.0)
    sigmoid = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))]

    assert out.loss.item() == pytest.approx((-4 * sigmoid[0] + 2 * sigmoid[1]) / 2)
    out.loss.backward()
    # 4 s (1 - s) r A
    slopes = [4 * s * (1 - s) for s in sigmoid]
    assert inputs.logprobs.grad.tolist() == pytest.approx([-slopes[0] * 2 / 2, slopes[1] * 2 / 2])
    assert out.metrics["loss/gate_mean"].item() == pytest.approx(sum(slopes) / 2)


def test_gspo_has_one_ratio_a_sequence():
    # geometric means 2 and 0.5
    inputs = inputs_of([4.0, 1.0, 0.5], [1.0, 1.0, -1.0], [2, 1])
    out = evaluate("gspo", inputs, clip_ratio_low=0.3, clip_ratio_high=0.5)

    assert out.loss.item() == pytest.approx(-(1.5 - 0.7) / 2)
    assert out.metrics["loss/clip_frac"].item() == 1


def test_gspo_token_is_gspo_while_advantages_are_equal_within_sequences():
    batch = make_batch(5, spread=0.1)
    options = {"clip_ratio_low": 0.03, "clip_ratio_high": 0.04}
    one, other = (
        evaluate(name, loss_inputs(batch, "sequence_mean"), **options).loss for name in ("gspo", "gspo_token")
    )

    torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradient(one, batch), gradient(other, batch))


def test_gspo_token_keeps_the_gradient_of_each_token_apart():
    inputs = inputs_of([1.0, 1.0], [1.0, -3.0], [2])
    evaluate("gspo_token", inputs).loss.backward()

    torch.testing.assert_close(inputs.logprobs.grad, torch.tensor([-0.5, 1.5]))


def test_sequence_surrogate_takes_the_product_of_ratios():
    out = evaluate("sequence_surrogate", inputs_of([1.1, 1.05, 0.5], [2.0, 2.0, -1.0], [2, 1]))

    assert out.loss.item() == pytest.approx(-(1.155 * 2 - 0.8) / 2)


def test_gmpo_clips_log_ratios_and_takes_their_mean():
    options = {"clip_log_ratio_low": 0.4, "clip_log_ratio_high": 0.4}
    good = inputs_of([math.exp(1.0), math.exp(-1.0)], [2.0, 2.0], [2])
    bad = inputs_of([math.exp(1.0), math.exp(-1.0)], [-2.0, -2.0], [2])

    out = evaluate("gmpo", good, **options)
    assert out.loss.item() == pytest.approx(-2 * math.exp((0.4 - 1) / 2))
    assert out.metrics["loss/clip_frac"].item() == 0.5
    assert evaluate("gmpo", bad, **options).loss.item() == pytest.approx(2 * math.exp((1 - 0.4) / 2))
    most = inputs_of([math.exp(1.0), math.exp(1.0), 1.0], [2.0] * 3, [3])
    assert evaluate("gmpo", most, **options).metrics["loss/clip_frac"].item() == pytest.approx(2 / 3)


def test_vespo_weighs_by_the_sequence_against_the_sampler():
    inputs = inputs_of([2.0, 1.5, 0.5], [1.0, 1.0, -1.0], [2, 1], old_logprobs=torch.full((3,), -9.0))
    out = evaluate("vespo", inputs)
    phi = [3.0**2 * math.exp(3 * (1 - 3.0)), 0.5**3 * math.exp(2 * (1 - 0.5))]

    out.loss.backward()
    expected = [-phi[0] / 4, -phi[0] / 4, phi[1] / 2]
    assert inputs.logprobs.grad.tolist() == pytest.approx(expected)
    assert out.metrics["loss/sequence_weight_mean"].item() == pytest.approx((2 * phi[0] + phi[1]) / 3)


@pytest.mark.parametrize(
    ("log_ratios", "log_w"),
    [([-4.0, -5.0], -9.0), ([-30.0, 14.0], -6.0), ([-12.0, -12.0], math.log(1e-8))],  # as TRL bounds both
)
def test_vespo_bounds_log_ratios_far_out(log_ratios, log_w):
    inputs = inputs_of([1.0, 1.0], [1.0, 1.0], [2], sampling_logprobs=-torch.tensor(log_ratios))
    evaluate("vespo", inputs).loss.backward()

    phi = math.exp(3 + 2 * log_w - 3 * math.exp(log_w))
    assert inputs.logprobs.grad.tolist() == pytest.approx([-phi / 2] * 2, rel=1e-4)


def test_clip_cov_leaves_out_the_selected_tokens():
    inputs = inputs_of([1.1, 0.9], [1.0, 1.0], is_selected=torch.tensor([True, False]))
    out = evaluate("clip_cov", inputs)
    out.loss.backward()

    torch.testing.assert_close(inputs.logprobs.grad, torch.tensor([0.0, -0.45]))
    assert out.metrics["loss/selected_frac"].item() == 0.5


def test_kl_cov_holds_the_selected_tokens_back():
    inputs = inputs_of([2.0, 2.0], [1.0, 1.0], is_selected=torch.tensor([True, False]))
    out = evaluate("kl_cov", inputs, covariance_kl_coef=0.5)
    out.loss.backward()

    assert out.loss.item() == pytest.approx((-4.0 + 0.5 * math.log(2)) / 2)
    torch.testing.assert_close(inputs.logprobs.grad, torch.tensor([(-2.0 + 0.5) / 2, -2.0 / 2]))


def test_batches_are_ragged_and_off_policy():
    batch: Batch = make_batch(0, with_holes=True)

    assert len(set(batch.present.sum(1).tolist())) > 2
    assert (batch.mask != batch.present).any()
    assert ((batch.logprobs - batch.old_logprobs).abs() > 0.2).any()
