"""Preference losses in a sum, where policies are almost certain, and the metrics of a step, by hand."""

import math

import pytest
import torch

from rlbench.algorithms.preference_losses import mismatch_kl
from rlbench.config.preference import PREFERENCE_LOSSES, PreferenceConfig
from rlbench.training.preference_objective import Completions, PreferenceObjective
from tests.algorithms.test_preference_losses import BETA, BY_HAND, NC, NR, RC, RR, C, R, adjacent


def objective(num_rows: int, num_chosen_tokens: int, **options) -> PreferenceObjective:
    return PreferenceObjective(
        config=PreferenceConfig(**options), num_rows=num_rows, num_chosen_tokens=num_chosen_tokens, num_desirable=0
    )


@pytest.mark.parametrize("name", [name for name, spec in PREFERENCE_LOSSES.items() if not spec.needs_reference])
def test_beside_a_loss_with_a_reference_one_without_still_reads_none(name):
    completions = Completions(
        logps=torch.tensor([C, R], dtype=torch.float64), ref_logps=torch.tensor([RC, RR], dtype=torch.float64),
        lengths=torch.tensor([NC, NR]), pairs=adjacent(2),
    )  # fmt: skip

    loss, _ = objective(1, NC, losses=["sigmoid", name], loss_weights=[0.5, 2.0], beta=BETA)(completions)

    assert loss.item() == pytest.approx(0.5 * BY_HAND["sigmoid"] + 2 * BY_HAND[name], rel=1e-12)


def test_the_odds_of_an_almost_certain_completion_are_exact_in_float32():
    means = [-3e-7, -1.0]
    logps = torch.tensor([2 * means[0], 3 * means[1]], requires_grad=True)
    completions = Completions(
        logps=logps, ref_logps=torch.zeros(2), lengths=torch.tensor([2, 3]), pairs=adjacent(2)
    )  # fmt: skip
    loss, _ = objective(1, 2, losses=["orpo"], beta=100.0)(completions)
    odds = [m - math.log(-math.expm1(m)) for m in means]

    assert loss.item() == pytest.approx(-means[0] + 100 * math.log1p(math.exp(odds[1] - odds[0])), rel=1e-4)


@pytest.mark.parametrize(("loss", "lengths"), [("sigmoid", [1, 1, 1, 1]), ("ipo", [2, 4, 1, 5])])
def test_the_metrics_of_pairs_by_hand(loss, lengths):
    """Ratios chosen and rejected 2, 1 and -3, 0.5; of losses on means by the token."""
    ratios = [2.0, 1.0, -3.0, 0.5]
    completions = Completions(
        logps=torch.tensor(ratios) - 7, ref_logps=torch.full((4,), -7.0), lengths=torch.tensor(lengths),
        pairs=adjacent(4),
    )  # fmt: skip

    _, metrics = objective(2, 3, losses=[loss])(completions)

    chosen, other_chosen, rejected, other_rejected = (ratios[i] / lengths[i] for i in (0, 2, 1, 3))
    assert metrics["preference/chosen"].item() == pytest.approx((chosen + other_chosen) / 2)
    assert metrics["preference/rejected"].item() == pytest.approx((rejected + other_rejected) / 2)
    assert metrics["preference/margin"].item() == pytest.approx((chosen - rejected + other_chosen - other_rejected) / 2)
    assert metrics["preference/accuracy"].item() == 0.5
    of_first = objective(1, 3, losses=[loss])
    single = Completions(
        logps=completions.logps[:2], ref_logps=completions.ref_logps[:2], lengths=completions.lengths[:2],
        pairs=adjacent(2),
    )  # fmt: skip
    assert of_first(single)[1]["preference/accuracy"].item() == 1


def test_the_kl_of_kto_carries_no_gradient():
    assert not mismatch_kl(torch.tensor([1.0, 2.0], requires_grad=True), torch.zeros(2)).requires_grad
