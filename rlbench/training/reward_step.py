"""One optimizer step of a reward model, and the same numbers on held-out pairs.

Shapes: B completions of one microbatch, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlbench.algorithms.reward_losses import bradley_terry
from rlbench.data.packing import Microbatch, pack, with_next_token
from rlbench.data.preferences import PreferenceRow
from rlbench.models.reward_model import RewardModel
from rlbench.records import TrainingSample
from rlbench.training.microbatch_budget import MicrobatchBudget, split_microbatches
from rlbench.training.preference_step import without_repeats
from rlbench.training.step import StepResult, add_shares, finish_step


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardBatch:
    """The pairs of one step, packed: chosen and rejected next to each other after their prompt."""

    microbatches: list[Microbatch]
    margins: list[Tensor]  # float32 [P] of each microbatch

    @property
    def num_pairs(self) -> int:
        return sum(map(len, self.margins))

    @property
    def pairs(self) -> list[tuple[TrainingSample, TrainingSample]]:
        """Chosen and rejected."""
        return [pair for mb in self.microbatches for pair in zip(mb.samples[::2], mb.samples[1::2], strict=True)]

    def split(self, tokens: int) -> RewardBatch:
        """The same pairs in microbatches of at most `tokens` tokens."""
        margin_of = {
            id(chosen): margin for (chosen, _), margin in zip(self.pairs, torch.cat(self.margins), strict=True)
        }
        microbatches = split_microbatches(self.microbatches, tokens)
        margins = [torch.stack([margin_of[id(chosen)] for chosen in mb.samples[::2]]) for mb in microbatches]
        return RewardBatch(microbatches=microbatches, margins=margins)


def make_reward_batch(
    rows: Sequence[PreferenceRow], *, tokens_per_microbatch: int, device: torch.device
) -> RewardBatch:
    """
    Raises:
        ValueError: a row exceeds `tokens_per_microbatch`.
    """
    margin_of = {row.row_id: row.margin for row in rows}
    microbatches = [
        microbatch
        for part in without_repeats(rows)
        for microbatch in pack(
            [with_next_token(sample) for row in part for sample in row.samples(0, 1)],
            tokens_per_microbatch=tokens_per_microbatch,
            device=device,
        )
    ]
    margins = [
        torch.tensor([margin_of[sample.group_id] for sample in microbatch.samples[::2]], device=device)
        for microbatch in microbatches
    ]
    return RewardBatch(microbatches=microbatches, margins=margins)


def reward_step(
    model: RewardModel,
    batch: RewardBatch,
    optimizer: torch.optim.Optimizer,
    *,
    centering_coef: float,
    max_grad_norm: float,
    budget: MicrobatchBudget | None = None,
) -> StepResult:
    """Make one update from a batch; the loss is the mean over its pairs.

    Args:
        model: its adapter and head are updated.
        batch: from `make_reward_batch`.
        optimizer: over `model.parameters()`, learning rate set.
        centering_coef: as in `bradley_terry`.
        max_grad_norm: as in `train_step`.
        budget: as in `train_step`.

    Raises:
        RunMemoryError: not even one pair a microbatch fits.
    """

    def accumulate(tokens: int | None) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        packed = batch if tokens is None else batch.split(tokens)
        sums: dict[str, Tensor] = {}
        for microbatch, margins in zip(packed.microbatches, packed.margins, strict=True):
            loss, shares = _loss(model.scores(microbatch), margins, centering_coef, batch.num_pairs)
            loss.backward()
            add_shares(sums, shares)
        return sums

    sums = budget.attempt(batch.pairs, accumulate) if budget else accumulate(None)
    sums["loss/total"] = sums["loss/reward_model"]
    return finish_step(model, optimizer, sums, [], max_grad_norm=max_grad_norm)


@torch.no_grad()
def held_out_rewards(
    model: RewardModel, batch: RewardBatch, *, centering_coef: float
) -> tuple[dict[str, float], Tensor]:
    """The metrics of a step, without an update, and the scores of all completions."""
    scores = [model.scores(microbatch) for microbatch in batch.microbatches]
    sums: dict[str, Tensor] = {}
    for part, margins in zip(scores, batch.margins, strict=True):
        add_shares(sums, _loss(part, margins, centering_coef, batch.num_pairs)[1])
    return {name: float(value) for name, value in sums.items()}, torch.cat(scores)


def _loss(scores: Tensor, margins: Tensor, centering_coef: float, num_pairs: int) -> tuple[Tensor, dict[str, Tensor]]:
    chosen, rejected = scores.view(-1, 2).unbind(1)  # [P]
    loss = bradley_terry(chosen, rejected, margins, centering_coef=centering_coef).sum() / num_pairs
    shares = {
        "loss/reward_model": loss,
        "reward_model/margin": (chosen - rejected).sum() / num_pairs,
        "reward_model/accuracy": (chosen > rejected).sum() / num_pairs,
        "reward_model/chosen": chosen.sum() / num_pairs,
        "reward_model/rejected": rejected.sum() / num_pairs,
    }
    return loss, {name: value.detach() for name, value in shares.items()}
