"""The objective of one update: policy loss, off-policy correction, KL penalty and entropy bonus, on tensors alone.

Shapes: N loss positions of one microbatch, or of one chunk of them where nothing needs whole sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlbench.algorithms import KL_ESTIMATORS, POLICY_LOSSES
from rlbench.algorithms.importance import importance_weights, off_policy_mask
from rlbench.algorithms.loss_inputs import LossInputs
from rlbench.config.algorithm import AlgorithmConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Loss and metrics of a microbatch's tokens, from their logprobs and entropies.

    loss = sum_t weight_t c_t policy_loss_t + kl_coef sum_t weight_t kl_t - entropy_coef mean_t entropy_t, where weight
    is the normalization and c the correction for off-policy tokens.
    """

    config: AlgorithmConfig
    num_loss_tokens: int  # over all microbatches of the update: the denominator of metrics
    num_bonus_tokens: int  # those that the entropy bonus acts on
    entropy_coef: float  # of this update

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, columns: Mapping[str, Tensor], num_sequences: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            logprobs: float32 [N], with gradient.
            entropy: float32 [N], with gradient if there is a bonus.
            columns: [N] each: advantages, loss_mask, sampling_logprobs, sequence_ids, weights; where there is one
                old_logprobs (else the policy is not updated yet and logprobs are taken), ref_logprobs, is_top_entropy,
                is_selected.
            num_sequences: of the microbatch.

        Returns:
            The part of the step's loss, and of its metrics.
        """
        mask = columns["loss_mask"]
        old = columns.get("old_logprobs", logprobs.detach())
        correction, metrics = self._correction(logprobs, old, columns, num_sequences)
        inputs = LossInputs(
            logprobs=logprobs,
            old_logprobs=old,
            sampling_logprobs=columns["sampling_logprobs"],
            advantages=columns["advantages"],
            loss_mask=mask,
            weights=columns["weights"] * correction,
            sequence_ids=columns["sequence_ids"],
            num_sequences=num_sequences,
            num_loss_tokens=self.num_loss_tokens,
            is_selected=columns.get("is_selected"),
        )
        output = POLICY_LOSSES[self.config.loss](inputs, **self.config.loss_options())
        loss = output.loss
        metrics |= output.metrics | self._observations(logprobs, entropy, old, columns)
        metrics["loss/policy"] = output.loss
        if "ref_logprobs" in columns:
            kl_loss, kl = self._kl(logprobs, old, columns)
            metrics["kl/reference"] = kl
            loss = loss + kl_loss
        if self.config.has_entropy_bonus:
            acted = mask & columns["is_top_entropy"] if "is_top_entropy" in columns else mask
            mean = torch.where(acted, entropy, 0.0).sum() / max(1, self.num_bonus_tokens)
            metrics["entropy/bonus_tokens_mean"] = mean.detach()
            loss = loss - self.entropy_coef * mean if self.entropy_coef else loss
        return loss, metrics

    def _correction(
        self, logprobs: Tensor, old: Tensor, columns: Mapping[str, Tensor], num_sequences: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Factor on each token's policy loss, without gradient: [N]."""
        config, mask, ids = self.config, columns["loss_mask"], columns["sequence_ids"]
        sampling = columns["sampling_logprobs"]
        factor = torch.ones_like(old)
        metrics: dict[str, Tensor] = {}
        if config.importance_method != "off":
            factor, is_outside = importance_weights(
                old,
                sampling,
                mask,
                ids,
                num_sequences,
                method=config.importance_method,
                **config.importance_options(),
            )
            metrics["importance/weight_mean"] = self._mean(factor, mask)
            metrics["importance/outside_frac"] = self._mean(is_outside.float(), mask)
        if config.off_policy_threshold is not None:
            kept = off_policy_mask(
                logprobs,
                sampling,
                columns["advantages"],
                mask,
                ids,
                num_sequences,
                threshold=config.off_policy_threshold,
            )
            factor = factor * kept
            metrics["importance/off_policy_frac"] = self._mean((~kept).float(), mask)
        if "is_top_entropy" in columns:
            factor = factor * columns["is_top_entropy"]
        return factor, metrics

    def _kl(self, logprobs: Tensor, old: Tensor, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        mask = columns["loss_mask"]
        parts = [torch.where(mask, values, 0.0) for values in (logprobs, columns["ref_logprobs"], old)]
        per_token = torch.where(mask, KL_ESTIMATORS[self.config.kl](*parts), 0.0)
        return self.config.kl_coef * (per_token * columns["weights"]).sum(), self._mean(per_token.detach(), mask)

    def _observations(
        self, logprobs: Tensor, entropy: Tensor, old: Tensor, columns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        mask = columns["loss_mask"]
        metrics = {"policy/entropy": self._mean(entropy.detach(), mask)}
        if "old_logprobs" in columns:
            moved = torch.where(mask, logprobs.detach() - old, 0.0)
            metrics["policy/kl_to_old"] = self._mean(torch.expm1(-moved) + moved, mask)
        if "is_top_entropy" in columns:
            metrics["policy/top_entropy_frac"] = self._mean(columns["is_top_entropy"].float(), mask)
        return metrics

    def _mean(self, values: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, values, 0.0).sum() / self.num_loss_tokens
