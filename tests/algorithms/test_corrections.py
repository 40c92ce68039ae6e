"""Importance weights, off-policy mask, normalizations, choices of tokens, entropy control, penalties."""

import math

import pytest
import torch

from rlbench.algorithms import NORMALIZATIONS
from rlbench.algorithms.entropy_control import EntropyControl
from rlbench.algorithms.importance import importance_weights, off_policy_mask
from rlbench.algorithms.reduce import BatchTotals, token_weights
from rlbench.algorithms.selection import covariances, select_at_random_within, select_highest, top_entropy_threshold
from rlbench.algorithms.shaping import overlong_penalty, returns_to_go
from rlbench.config import algorithm as settings

IDS = torch.tensor([0, 0, 1, 1])
MASK = torch.tensor([True, True, True, False])


def weights(ratios: list[float], **options):
    old = torch.tensor([math.log(r) for r in ratios]).requires_grad_()
    values, is_outside = importance_weights(old, torch.zeros(4), MASK, IDS, 2, **options)
    assert not values.requires_grad
    return values[:3].tolist(), is_outside[:3].tolist()


def test_token_weights_are_truncated():
    values, is_outside = weights([3.0, 0.5, 1.5, 9.0], method="truncate", level="token", low=None, high=2.0)

    assert values == pytest.approx([2.0, 0.5, 1.5])
    assert is_outside == [True, False, False]


def test_tokens_outside_the_bounds_are_masked():
    values, is_outside = weights([6.0, 0.4, 1.5, 9.0], method="mask", level="token", low=0.5, high=5.0)

    assert values == pytest.approx([0.0, 0.0, 1.5])
    assert is_outside == [True, True, False]


def test_a_sequence_weighs_by_the_product_of_its_ratios():
    assert weights([2.0, 0.75, 1.2, 9.0], method="truncate", level="sequence", low=None, high=1.3)[0] == pytest.approx(
        [1.3, 1.3, 1.2]
    )
    assert weights([2.0, 0.75, 1.2, 9.0], method="mask", level="sequence", low=None, high=1.3)[0] == pytest.approx(
        [0.0, 0.0, 1.2]
    )


def test_the_geometric_level_takes_the_mean_of_the_log_ratios():
    values, _ = weights([4.0, 1.0, 0.5, 9.0], method="mask", level="geometric", low=0.9, high=3.0)

    assert values == pytest.approx([2.0, 2.0, 0.0])
    values, _ = weights([4.0, 1.0, 0.5, 9.0], method="truncate", level="geometric", low=None, high=3.0)
    assert values == pytest.approx([2.0, 2.0, 0.5])  # of the second sequence one token counts


def test_truncated_weights_correct_the_mean_of_the_wrong_policy():
    generator = torch.Generator().manual_seed(0)
    policy, sampler = (torch.randn(4, generator=generator).log_softmax(0) for _ in range(2))
    value = torch.tensor([1.0, -2.0, 0.5, 3.0])
    tokens = torch.multinomial(sampler.exp(), 100_000, replacement=True, generator=generator)
    ids = torch.arange(len(tokens))
    rho, _ = importance_weights(
        policy[tokens], sampler[tokens], torch.ones_like(ids, dtype=torch.bool), ids, len(ids),
        method="truncate", level="token", low=None, high=100.0,
    )  # fmt: skip

    exact = (policy.exp() * value).sum().item()
    assert (rho * value[tokens]).mean().item() == pytest.approx(exact, abs=0.03)
    assert value[tokens].mean().item() != pytest.approx(exact, abs=0.2)


def test_only_bad_sequences_far_from_the_sampler_are_left_out():
    logprobs = torch.tensor([-2.0, -1.0, -2.0, -2.0])
    sampling = torch.full((4,), -1.0)
    mask = torch.ones(4, dtype=torch.bool)

    def kept(advantages: list[float], threshold: float) -> list[bool]:
        values = torch.tensor(advantages)
        return off_policy_mask(logprobs, sampling, values, mask, IDS, 2, threshold=threshold).tolist()

    assert kept([-1.0] * 4, 0.6) == [True, True, False, False]  # mean gaps 0.5 and 1
    assert kept([-1.0, -1.0, 1.0, 1.0], 0.6) == kept([-1.0, -1.0, 0.0, 0.0], 0.6) == [True] * 4
    assert kept([-1.0] * 4, 0.4) == [False] * 4


TOTALS = BatchTotals(num_loss_tokens=10, num_sequences=4, max_completion_tokens=8)


def normalized(name: str) -> list[float]:
    return token_weights(MASK, IDS, name, TOTALS, num_sequences=2, num_microbatches=5).tolist()


def test_normalizations_match_hand_computed_weights():
    assert normalized("token_mean") == pytest.approx([0.1, 0.1, 0.1, 0.0])
    assert normalized("sequence_mean") == pytest.approx([1 / 8, 1 / 8, 1 / 4, 0.0])
    assert normalized("sequence_sum") == pytest.approx([0.25, 0.25, 0.25, 0.0])
    assert normalized("constant") == pytest.approx([1 / 32, 1 / 32, 1 / 32, 0.0])
    assert normalized("microbatch_token_mean") == pytest.approx([1 / 15, 1 / 15, 1 / 15, 0.0])
    assert list(NORMALIZATIONS) == settings.NORMALIZATIONS


def test_a_sequence_without_loss_tokens_has_weight_zero():
    mask = torch.tensor([False, False, True, True])

    for name in NORMALIZATIONS:
        values = token_weights(mask, IDS, name, TOTALS, num_sequences=2, num_microbatches=1)
        assert torch.isfinite(values).all() and values[:2].tolist() == [0.0, 0.0]


def test_the_threshold_is_the_quantile_of_the_entropies():
    entropies = torch.rand(1001, generator=torch.Generator().manual_seed(0))

    for share in (0.01, 0.2, 0.5, 1.0):
        expected = torch.quantile(entropies, 1 - share).item()
        assert top_entropy_threshold(entropies, share) == pytest.approx(expected, abs=1e-6)


def test_covariances_match_hand_computed_values():
    values = covariances(torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([3.0, 1.0, 2.0]))

    assert values.tolist() == [1.0, 1.0, 0.0]
    assert covariances(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0])).tolist() == [-0.25, -0.25]


def test_the_highest_covariances_are_selected():
    covariance = torch.tensor([0.1, 5.0, 2.0, -9.0, 0.0])

    assert select_highest(covariance, torch.Generator(), covariance_frac=0.4).tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert select_highest(covariance, torch.Generator(), covariance_frac=1e-9).sum() == 1


def test_the_random_selection_stays_within_bounds_and_follows_its_seed():
    covariance = torch.linspace(0, 10, 1000)
    options = {"covariance_frac": 0.02, "covariance_low": 1.0, "covariance_high": 5.0}

    picks = [select_at_random_within(covariance, torch.Generator().manual_seed(s), **options) for s in (0, 0, 1)]

    assert all(pick.sum() == 20 for pick in picks)
    assert covariance[picks[0]].min() >= 1 and covariance[picks[0]].max() <= 5
    assert torch.equal(picks[0], picks[1]) and not torch.equal(picks[0], picks[2])
    few = options | {"covariance_frac": 1e-9}
    assert select_at_random_within(covariance, torch.Generator(), **few).sum() == 1


def test_no_candidate_no_selection():
    options = {"covariance_frac": 0.5, "covariance_low": 1.0, "covariance_high": 5.0}

    assert not select_at_random_within(torch.zeros(10), torch.Generator(), **options).any()


def test_a_constant_coefficient_stays():
    control = EntropyControl(coef=0.3)
    control.observe(0.0)

    assert control.applied == control.coef == 0.3


def test_the_control_raises_the_coefficient_below_the_target_and_lowers_it_above():
    control = EntropyControl(coef=0.0, target=1.0, delta=0.1, low=0.0, high=0.15)
    seen = []
    for entropy in (0.5, 0.5, 0.5, 2.0, 2.0):
        seen.append(control.applied)
        control.observe(entropy)

    assert seen == pytest.approx([0.0, 0.1, 0.15, 0.15, 0.0])
    assert control.coef == 0.0


def test_the_control_continues_from_its_state():
    control = EntropyControl(coef=0.0, target=1.0, delta=0.1)
    control.observe(0.5)
    other = EntropyControl(coef=0.0, target=1.0, delta=0.1)
    other.restore(control.state())

    assert other == control and other.applied == 0.1


def test_the_penalty_on_long_completions_is_a_slope():
    penalties = [overlong_penalty(n, max_tokens=100, buffer_tokens=20, penalty=0.5) for n in (0, 80, 85, 90, 100, 105)]

    assert penalties == pytest.approx([0.0, 0.0, -0.125, -0.25, -0.5, -0.5])


def test_returns_sum_the_penalties_that_are_still_to_come():
    assert returns_to_go(1.0, [0.1, 0.2, 0.4], kl_coef=0.5) == pytest.approx([1 - 0.35, 1 - 0.3, 1 - 0.2])
