"""The preference losses of a config on the logprobs of whole completions, on tensors alone.

Shapes: B completions of one microbatch or of the whole step; P pairs of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlbench.algorithms.preference_losses import (
    PREFERENCE_LOSSES,
    UNPAIRED_LOSSES,
    PairInputs,
    SingleInputs,
    divergence_scores,
)
from rlbench.config.preference import PreferenceConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """What is known of the completions of a microbatch. All tensors but `pairs` [B]."""

    logps: Tensor  # sum of the completion's logprobs, carries gradient
    ref_logps: Tensor  # of the reference; 0 where no loss needs it
    lengths: Tensor  # tokens
    pairs: Tensor  # int64 [P, 2]: places of chosen and rejected; [0, 2] of unpaired losses
    log_weights: Tensor | None = None  # wpo: mean log weight of a token, without gradient
    is_desirable: Tensor | None = None  # bool; of unpaired losses

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of values [B] those of chosen and of rejected completions: [P] each."""
        return values[self.pairs[:, 0]], values[self.pairs[:, 1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceObjective:
    """Loss and metrics of a microbatch: parts whose sums over the step are its loss and its means."""

    config: PreferenceConfig
    num_rows: int  # pairs of the step; of unpaired losses its completions
    num_chosen_tokens: int  # of the step
    num_desirable: int  # of the step
    kl: Tensor | None = None  # [], of losses that read it

    def __call__(self, completions: Completions) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self._singles(completions) if self.config.is_unpaired else self._pairs(completions)
        metrics["loss/preference"] = loss.detach()
        return loss, {name: value.detach() for name, value in metrics.items()}

    def _pairs(self, completions: Completions) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = self._pair_inputs(completions)
        names = self.config.weighted_losses()
        per_pair = sum(
            (weight * PREFERENCE_LOSSES[name](inputs, **options) for name, weight, options in names),
            start=torch.zeros_like(inputs.chosen_logps),
        )  # [P]
        metrics: dict[str, Tensor] = {}
        if completions.log_weights is not None:
            chosen, rejected = completions.split(completions.log_weights)
            weights = torch.exp(chosen + rejected)  # [P]
            per_pair = per_pair * weights
            metrics["preference/wpo_weight"] = weights.sum() / self.num_rows
        chosen, rejected = inputs.chosen_ratios, inputs.rejected_ratios
        if self.config.specs[0].compares_means:
            chosen, rejected = chosen / inputs.chosen_lengths, rejected / inputs.rejected_lengths
        margin = chosen - rejected
        metrics |= {
            "preference/margin": margin.sum() / self.num_rows,
            "preference/accuracy": (margin > 0).sum() / self.num_rows,
            "preference/chosen": chosen.sum() / self.num_rows,
            "preference/rejected": rejected.sum() / self.num_rows,
        }
        return per_pair.sum() / self.num_rows, metrics

    def _pair_inputs(self, completions: Completions) -> PairInputs:
        chosen, rejected = completions.split(completions.logps)  # [P]
        ref_chosen, ref_rejected = completions.split(completions.ref_logps)
        chosen_lengths, rejected_lengths = completions.split(completions.lengths.to(chosen.dtype))
        divergence, alpha = self.config.divergence, self.config.alpha
        return PairInputs(
            chosen_logps=chosen,
            rejected_logps=rejected,
            ref_chosen_logps=ref_chosen,
            ref_rejected_logps=ref_rejected,
            chosen_scores=divergence_scores(chosen - ref_chosen, divergence, alpha),
            rejected_scores=divergence_scores(rejected - ref_rejected, divergence, alpha),
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            num_pairs=self.num_rows,
            num_chosen_tokens=self.num_chosen_tokens,
        )

    def _singles(self, completions: Completions) -> tuple[Tensor, dict[str, Tensor]]:
        assert completions.is_desirable is not None
        zero = completions.logps.new_zeros(())
        inputs = SingleInputs(
            logps=completions.logps,
            ref_logps=completions.ref_logps,
            is_desirable=completions.is_desirable,
            kl=zero if self.kl is None else self.kl,
        )
        ((name, weight, options),) = self.config.weighted_losses()
        loss = weight * UNPAIRED_LOSSES[name](inputs, **options).sum() / self.num_rows
        ratio, is_good = completions.logps - completions.ref_logps, completions.is_desirable
        num_undesirable = self.num_rows - self.num_desirable
        metrics = {"preference/accuracy": ((ratio > inputs.kl) == is_good).sum() / self.num_rows}
        if self.num_desirable:  # a mean of none is no 0
            metrics["preference/chosen"] = torch.where(is_good, ratio, 0.0).sum() / self.num_desirable
        if num_undesirable:
            metrics["preference/rejected"] = torch.where(is_good, 0.0, ratio).sum() / num_undesirable
        if self.num_desirable and num_undesirable:
            metrics["preference/margin"] = metrics["preference/chosen"] - metrics["preference/rejected"]
        return loss, metrics
