"""Every policy loss away from the sampling policy, against its paper's formula in float64: value, gradient, metrics.

The formulas are written sequence by sequence in plain torch, without weights, ids or masks of ours.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlbench.algorithms import POLICY_LOSSES
from rlbench.algorithms.loss_inputs import LossInputs
from rlbench.algorithms.reduce import BatchTotals, token_weights
from rlbench.config.algorithm import LOSSES
from tests.algorithms.batches import MAX_TOKENS, Batch, make_batch

LOW, HIGH = 0.1, 0.25
CLIP = {"clip_ratio_low": LOW, "clip_ratio_high": HIGH}


def lower(*values: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*values)).min(0).values


def clipped(ratio: Tensor, advantage: Tensor) -> Tensor:
    """-min(r A, clip(r) A)."""
    inside = lower(torch.full_like(ratio, 1 + HIGH), -lower(torch.full_like(ratio, -(1 - LOW)), -ratio))
    return -lower(ratio * advantage, inside * advantage)


def sapo(ratio: Tensor, advantage: Tensor) -> Tensor:
    tau = 1.5 if advantage > 0 else 2.5
    return -4 / tau / (1 + torch.exp(-tau * (ratio - 1))) * advantage


def gmpo(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    bounded = lower(log_ratio, torch.tensor(0.15)) if advantage > 0 else -lower(-log_ratio, torch.tensor(0.05))
    return -torch.exp(bounded.mean()) * advantage


def vespo(logprobs: Tensor, sampling: Tensor, advantage: Tensor) -> Tensor:
    w = torch.exp((logprobs - sampling).sum()).detach()
    k, rate = (2.0, 3.0) if advantage > 0 else (3.0, 2.0)
    return -(w**k) * torch.exp(rate * (1 - w)) * advantage * logprobs


# of one sequence's loss tokens: logprobs p, old q, sampler s, advantage A, selected c
Formula = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
FORMULAS: dict[str, tuple[dict[str, float], Formula]] = {
    "reinforce": ({}, lambda p, q, s, A, c: -A * p),
    "clipped_surrogate": (CLIP, lambda p, q, s, A, c: clipped((p - q).exp(), A)),
    "cispo": ({"clip_ratio_max": 1.2}, lambda p, q, s, A, c: -(p - q).detach().exp().clamp(max=1.2) * A * p),
    "sapo": (
        {"gate_temperature_pos": 1.5, "gate_temperature_neg": 2.5}, lambda p, q, s, A, c: sapo((p - q).exp(), A)
    ),
    "clip_cov": (CLIP, lambda p, q, s, A, c: torch.where(c, 0.0, clipped((p - q).exp(), A))),
    "kl_cov": (
        {"covariance_kl_coef": 0.7}, lambda p, q, s, A, c: -(p - q).exp() * A + torch.where(c, 0.7 * (p - q).abs(), 0.0)
    ),
    "gspo": (CLIP, lambda p, q, s, A, c: clipped((p - q).mean().exp(), A)),
    "gspo_token": (CLIP, lambda p, q, s, A, c: clipped((p - q).mean().exp().detach() * (p - p.detach()).exp(), A)),
    "sequence_surrogate": (CLIP, lambda p, q, s, A, c: clipped((p - q).sum().exp(), A)),
    "gmpo": (
        {"clip_log_ratio_low": 0.05, "clip_log_ratio_high": 0.15}, lambda p, q, s, A, c: gmpo(p - q, A)
    ),
    "vespo": ({}, lambda p, q, s, A, c: vespo(p, s, A)),
}  # fmt: skip


def batch_of(seed: int) -> tuple[Batch, Tensor]:
    """With holes in the masks, one completion without a loss token, advantages of both signs and 0."""
    drawn = make_batch(seed, num_sequences=8, with_holes=True)
    drawn.mask[1] = False
    drawn.advantages[4] = 0.0
    tensors = {name: getattr(drawn, name).detach() for name in drawn.__dataclass_fields__}
    batch = Batch(**{name: value.double() if value.is_floating_point() else value for name, value in tensors.items()})
    batch.logprobs.requires_grad_()
    selected = torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    return batch, selected


def ours(name: str, batch: Batch, selected: Tensor, parts: list[list[int]], **options: float):
    """Sum over microbatches of `parts`, and of their metrics; mean over sequences."""
    totals = BatchTotals(
        num_loss_tokens=int(batch.mask.sum()), num_sequences=len(batch.mask), max_completion_tokens=MAX_TOKENS
    )
    outputs = []
    for part in parts:
        rows = batch.rows(part)
        ids = torch.arange(len(part))[:, None].expand_as(rows.mask)[rows.present]
        mask = rows.packed(rows.mask)
        weights = token_weights(mask, ids, "sequence_mean", totals, num_sequences=len(part), num_microbatches=1)
        inputs = LossInputs(
            logprobs=rows.packed(rows.logprobs),
            old_logprobs=rows.packed(rows.old_logprobs),
            sampling_logprobs=rows.packed(rows.sampling_logprobs),
            advantages=rows.packed(rows.advantages[:, None].expand_as(rows.mask)),
            loss_mask=mask,
            weights=weights,
            sequence_ids=ids,
            num_sequences=len(part),
            num_loss_tokens=totals.num_loss_tokens,
            is_selected=rows.packed(selected[part]),
        )
        outputs.append(POLICY_LOSSES[name](inputs, **{**LOSSES[name].options, **options}))
    metrics = {key: sum(output.metrics[key] for output in outputs) for key in outputs[0].metrics}
    return torch.stack([output.loss for output in outputs]).sum(), metrics


@pytest.mark.parametrize("parts", [[[*range(8)]], [[0, 1, 2], [3, 4, 5, 6, 7]], [[0], [1], [2, 3], [4, 5, 6], [7]]])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_value_and_gradient_are_those_of_the_paper(name, parts):
    options, formula = FORMULAS[name]
    for seed in (0, 1, 2):
        batch, selected = batch_of(seed)
        of_sequences = [
            formula(*(values[row][mask] for values in (batch.logprobs, batch.old_logprobs, batch.sampling_logprobs)),
                    batch.advantages[row], selected[row][mask]).mean()
            for row, mask in enumerate(batch.mask) if mask.any()
        ]  # fmt: skip
        expected = torch.stack(of_sequences).sum() / len(batch.mask)

        loss, _ = ours(name, batch, selected, parts, **options)

        gradients = [torch.autograd.grad(value, batch.logprobs)[0] for value in (loss, expected)]
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)
        assert gradients[1].abs().max() > 1e-3


def has_no_gradient(name: str, batch: Batch, selected: Tensor) -> float:
    """Share of loss tokens that have an advantage and no gradient."""
    loss, _ = ours(name, batch, selected, [[*range(8)]], **FORMULAS[name][0])
    flat = torch.autograd.grad(loss, batch.logprobs)[0] == 0
    return float((flat & batch.mask & (batch.advantages != 0)[:, None]).sum() / batch.mask.sum())


@pytest.mark.parametrize("name", ["clipped_surrogate", "gspo", "gspo_token", "sequence_surrogate"])
def test_the_clipped_share_is_that_of_the_tokens_without_gradient(name):
    batch, selected = batch_of(3)
    _, metrics = ours(name, batch, selected, [[0, 1, 2], [3, 4, 5, 6, 7]], **FORMULAS[name][0])

    assert metrics["loss/clip_frac"].item() == pytest.approx(has_no_gradient(name, batch, selected))
    assert metrics["loss/clip_frac"] > 0


def test_the_shares_of_losses_that_select_or_cap():
    batch, selected = batch_of(3)
    num_tokens = batch.mask.sum()
    ratio = (batch.logprobs - batch.old_logprobs).exp()

    def share(where: Tensor) -> float:
        return float((where & batch.mask).sum() / num_tokens)

    def metrics(name: str) -> dict[str, Tensor]:
        return ours(name, batch, selected, [[0, 1, 2], [3, 4, 5, 6, 7]], **FORMULAS[name][0])[1]

    assert metrics("cispo")["loss/clip_frac"].item() == pytest.approx(share(ratio > 1.2))
    assert metrics("clip_cov")["loss/selected_frac"].item() == pytest.approx(share(selected))
    assert metrics("kl_cov")["loss/selected_frac"].item() == pytest.approx(share(selected))
    advantages = batch.advantages[:, None]
    is_clipped = ((advantages > 0) & (ratio > 1 + HIGH)) | ((advantages < 0) & (ratio < 1 - LOW))
    assert metrics("clip_cov")["loss/clip_frac"].item() == pytest.approx(share(is_clipped))
