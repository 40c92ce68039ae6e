"""One optimizer step: forward and backward of every microbatch, clipping, update.

Shapes: N loss positions of one microbatch, n of one chunk of them, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlbench.algorithms import KL_ESTIMATORS, POLICY_LOSSES
from rlbench.algorithms.policy_losses import LossInputs
from rlbench.config.schema import AlgorithmConfig
from rlbench.data.packing import Microbatch
from rlbench.models.policy import Policy
from rlbench_kernels import linear_logprobs, linear_token_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    is_applied: bool  # False: the loss or the gradient was not finite; parameters and optimizer are unchanged
    metrics: dict[str, float]
    logprobs: list[Tensor]  # of each microbatch, float32 [N], detached: the trainer's before the update


def train_step(
    policy: Policy,
    microbatches: Sequence[Microbatch],
    optimizer: torch.optim.Optimizer,
    config: AlgorithmConfig,
    *,
    temperature: float,
    max_grad_norm: float,
) -> StepResult:
    """Make one update from packed microbatches.

    The loss is a mean over all loss tokens of the step: their number is counted before the first forward, so that
    the split into microbatches changes nothing.

    Args:
        policy: its adapter is updated.
        microbatches: all data of the step, on the policy's device.
        optimizer: over `policy.parameters()`, learning rate set.
        config: the `algorithm` part of the config.
        temperature: of sampling; logprobs are taken at the same temperature.
        max_grad_norm: the gradient's L2 norm is scaled down to it; 0 does not clip.
    """
    num_loss_tokens = sum(int(mb.loss_mask.sum()) for mb in microbatches)
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    all_logprobs: list[Tensor] = []
    for microbatch in microbatches:
        shares, logprobs = _backward(policy, microbatch, config, num_loss_tokens, temperature)
        all_logprobs.append(logprobs)
        for name, value in shares.items():
            sums[name] = torch.maximum(sums[name], value) if name in sums and name.endswith("_max") else (
                sums.get(name, 0.0) + value  # type: ignore[operator]
            )  # fmt: skip
    limit = max_grad_norm or math.inf
    grad_norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), limit))
    metrics = {name: float(value) for name, value in sums.items()} | {"optim/grad_norm": grad_norm}
    is_finite = math.isfinite(grad_norm) and math.isfinite(metrics["loss/total"])
    if is_finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(is_applied=is_finite, metrics=metrics, logprobs=all_logprobs)


def _backward(
    policy: Policy, microbatch: Microbatch, config: AlgorithmConfig, num_loss_tokens: int, temperature: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Accumulate the microbatch's gradient; returns its share of the step's metrics and its logprobs [N]."""
    columns = {
        "advantages": microbatch.advantages,
        "loss_mask": microbatch.loss_mask,
        "sampling_logprobs": microbatch.sampling_logprobs,
    }
    if config.kl_coef > 0:
        columns["ref_logprobs"] = _reference_logprobs(policy, microbatch, temperature)

    def token_loss(logprobs: Tensor, entropy: Tensor, part: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return _token_loss(logprobs, entropy, part, config, num_loss_tokens)

    loss, metrics, logprobs = linear_token_loss(
        policy.hidden(microbatch), policy.head_weight, microbatch.targets, token_loss, columns, temperature=temperature
    )
    loss.backward()
    return metrics | {"loss/total": loss.detach()}, logprobs


def _token_loss(
    logprobs: Tensor, entropy: Tensor, columns: Mapping[str, Tensor], config: AlgorithmConfig, num_loss_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss plus KL penalty of one chunk; all arguments [n]. Metrics are shares of the step's means."""
    mask = columns["loss_mask"]
    inputs = LossInputs(
        logprobs=logprobs,
        # One update a batch: the policy before the update is the current one.
        old_logprobs=logprobs.detach(),
        advantages=columns["advantages"],
        loss_mask=mask,
        num_loss_tokens=num_loss_tokens,
    )
    clip = {"clip_ratio_low": config.clip_ratio_low, "clip_ratio_high": config.clip_ratio_high}
    output = POLICY_LOSSES[config.loss](inputs, **clip)
    gap = torch.where(mask, logprobs.detach() - columns["sampling_logprobs"], 0.0)  # [n]
    metrics = output.metrics | {
        "loss/policy": output.loss,
        "policy/entropy": (entropy.detach() * mask).sum() / num_loss_tokens,
        "drift/logprob_gap_mean": gap.abs().sum() / num_loss_tokens,
        "drift/logprob_gap_max": gap.abs().max(),
    }
    if "ref_logprobs" not in columns:
        return output.loss, metrics
    per_token = KL_ESTIMATORS[config.kl](
        torch.where(mask, logprobs, 0.0), torch.where(mask, columns["ref_logprobs"], 0.0)
    )
    kl = (per_token * mask).sum() / num_loss_tokens
    return output.loss + config.kl_coef * kl, metrics | {"kl/reference": kl}


def _reference_logprobs(policy: Policy, microbatch: Microbatch, temperature: float) -> Tensor:
    """float32 [N]: the same base with the adapter switched off."""
    with policy.reference():
        hidden = policy.hidden(microbatch)
        return linear_logprobs(hidden, policy.head_weight, microbatch.targets, temperature=temperature)[0]
