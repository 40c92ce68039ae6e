"""One optimizer step: forward and backward of every microbatch, clipping, update.

Shapes: N loss positions of one microbatch, n of one chunk of them, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlbench.algorithms.reduce import BatchTotals, token_weights
from rlbench.config.algorithm import AlgorithmConfig
from rlbench.data.packing import Microbatch
from rlbench.models.policy import Policy
from rlbench.records import SamplingParams
from rlbench.training.microbatch_budget import MicrobatchBudget, as_before, fitted
from rlbench.training.objective import Objective
from rlbench.training.support import sampler_support, support_floor
from rlbench.training.token_choice import choose_tokens
from rlbench_kernels import linear_logprobs, linear_token_loss

Columns = Mapping[str, Tensor]  # per-token tensors [N] that are fixed before the batch's first update


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
    totals: BatchTotals | None = None,
    columns: Sequence[Columns] | None = None,
    entropy_coef: float | None = None,
    budget: MicrobatchBudget | None = None,
    sampler: SamplingParams | None = None,
) -> StepResult:
    """Make one update from packed microbatches.

    Denominators are counted before the first forward, so that the split into microbatches changes nothing.

    Args:
        policy: its adapter is updated.
        microbatches: all data of the step, on the policy's device.
        optimizer: over `policy.parameters()`, learning rate set.
        config: the `algorithm` part of the config.
        temperature: of sampling; logprobs are taken at the same temperature.
        max_grad_norm: the gradient's L2 norm is scaled down to it; 0 does not clip.
        totals: counts of the update where samples without advantage were left out; None: those of `microbatches`.
        columns: from `fixed_columns`, for each microbatch; None: made here.
        entropy_coef: None: `config.entropy_coef`.
        budget: a forward or backward pass that finds no memory is made again in smaller microbatches; None: an error.
        sampler: with algorithm.support=sampler how the completions were drawn, at `temperature`, only truncated; None:
            logprobs are those of the full softmax.

    Raises:
        RunMemoryError: not even one sample a microbatch fits.
    """
    totals = totals or count_totals(microbatches)
    if columns is None:
        columns = fixed_columns(policy, microbatches, config, temperature=temperature, seed=0, sampler=sampler)
    top = [part["is_top_entropy"] & mb.loss_mask if "is_top_entropy" in part else mb.loss_mask
           for mb, part in zip(microbatches, columns, strict=True)]  # fmt: skip
    objective = Objective(
        config=config,
        num_loss_tokens=max(1, sum(int(mb.loss_mask.sum()) for mb in microbatches)),
        num_bonus_tokens=sum(int(mask.sum()) for mask in top),
        entropy_coef=config.entropy_coef if entropy_coef is None else entropy_coef,
    )

    def accumulate(tokens: int | None) -> tuple[dict[str, Tensor], list[Tensor]]:
        optimizer.zero_grad(set_to_none=True)
        packed, fixed_of = (microbatches, columns) if tokens is None else fitted(microbatches, columns, tokens)
        sums: dict[str, Tensor] = {}
        all_logprobs: list[Tensor] = []
        for microbatch, fixed in zip(packed, fixed_of, strict=True):
            weights = _weights(microbatch, config, totals, len(packed))
            own = {**fixed, "weights": weights}
            shares, logprobs = _backward(policy, microbatch, own, objective, temperature, sampler)
            all_logprobs.append(logprobs)
            add_shares(sums, shares)
        return sums, as_before(all_logprobs, packed, microbatches)

    samples = [sample for microbatch in microbatches for sample in microbatch.samples]
    sums, all_logprobs = budget.attempt([[sample] for sample in samples], accumulate) if budget else accumulate(None)
    return finish_step(policy, optimizer, sums, all_logprobs, max_grad_norm=max_grad_norm)


def add_shares(sums: dict[str, Tensor], shares: Mapping[str, Tensor]) -> None:
    """Add a microbatch's shares of the step's metrics; those named *_max by their maximum."""
    for name, value in shares.items():
        sums[name] = torch.maximum(sums[name], value) if name in sums and name.endswith("_max") else (
            sums.get(name, 0.0) + value  # type: ignore[operator]
        )  # fmt: skip


def finish_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    sums: Mapping[str, Tensor],
    logprobs: list[Tensor],
    *,
    max_grad_norm: float,
) -> StepResult:
    """Clip the accumulated gradient and apply it, unless it or `loss/total` is not finite.

    Args:
        sums: the step's metrics, among them "loss/total".
        logprobs: of each microbatch, handed on.
        max_grad_norm: as in `train_step`.
    """
    limit = max_grad_norm or math.inf
    grad_norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), limit))
    metrics = {name: float(value) for name, value in sums.items()} | {"optim/grad_norm": grad_norm}
    is_finite = math.isfinite(grad_norm) and math.isfinite(metrics["loss/total"])
    if is_finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(is_applied=is_finite, metrics=metrics, logprobs=logprobs)


def count_totals(microbatches: Sequence[Microbatch], max_completion_tokens: int | None = None) -> BatchTotals:
    """Totals of an update that leaves nothing out; the longest completion stands for the limit if that is not given."""
    longest = max(int(torch.bincount(mb.sequence_ids).max()) for mb in microbatches)
    return BatchTotals(
        num_loss_tokens=sum(int(mb.loss_mask.sum()) for mb in microbatches),
        num_sequences=sum(mb.num_sequences for mb in microbatches),
        max_completion_tokens=max_completion_tokens or longest,
    )


def _weights(microbatch: Microbatch, config: AlgorithmConfig, totals: BatchTotals, num_microbatches: int) -> Tensor:
    return token_weights(
        microbatch.loss_mask,
        microbatch.sequence_ids,
        config.normalization,
        totals,
        num_sequences=microbatch.num_sequences,
        num_microbatches=num_microbatches,
    )


def _backward(
    policy: Policy,
    microbatch: Microbatch,
    fixed: Columns,
    objective: Objective,
    temperature: float,
    sampler: SamplingParams | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Accumulate the microbatch's gradient; returns its share of the step's metrics and its logprobs [N]."""
    columns = {
        "advantages": microbatch.advantages,
        "loss_mask": microbatch.loss_mask,
        # like with like: without truncation and penalties, or with the truncation that the trainer's have too
        "sampling_logprobs": microbatch.sampling_logprobs if sampler else microbatch.engine_logprobs,
        "sequence_ids": microbatch.sequence_ids,
        **fixed,
    }
    hidden, weight, targets = policy.hidden(microbatch), policy.head_weight, microbatch.targets
    softcap, floor = policy.softcap, columns.get("support_floor")
    support = sampler_support(hidden, weight, targets, sampler, floor, softcap) if sampler else None

    def loss_of(logprobs: Tensor, entropy: Tensor, part: Columns) -> tuple[Tensor, dict[str, Tensor]]:
        return objective(logprobs, entropy, part, microbatch.num_sequences)

    if objective.config.needs_sequences:
        logprobs, entropy = linear_logprobs(
            hidden, weight, targets, temperature=temperature, softcap=softcap, support=support
        )
        loss, metrics = loss_of(logprobs, entropy if objective.entropy_coef else entropy.detach(), columns)
        metrics = {name: value.detach() for name, value in metrics.items()}
    else:
        loss, metrics, logprobs = linear_token_loss(
            hidden, weight, targets, loss_of, columns, temperature=temperature, softcap=softcap, support=support
        )
    loss.backward()
    return metrics | {"loss/total": loss.detach()}, logprobs.detach()


def fixed_columns(
    policy: Policy,
    microbatches: Sequence[Microbatch],
    config: AlgorithmConfig,
    *,
    temperature: float,
    seed: int,
    reference: Policy | None = None,
    sampler: SamplingParams | None = None,
) -> list[dict[str, Tensor]]:
    """Columns that stay the same over the updates of a batch, for each microbatch, made before the first.

    `ref_logprobs` with a KL penalty in the loss. `old_logprobs` where the policy will have moved, or where tokens are
    chosen by statistics of the whole batch (`is_top_entropy`, `is_selected`); with one update they are the forward's
    own logprobs, and no extra forward is made. With them `support_floor` where there is a sampler.

    Args:
        seed: of the random choice that some losses make.
        reference: as in `reference_logprobs`.
        sampler: as in `train_step`.
    """
    columns: list[dict[str, Tensor]] = [{} for _ in microbatches]
    if config.has_kl_loss:
        for microbatch, part in zip(microbatches, columns, strict=True):
            part["ref_logprobs"] = reference_logprobs(policy, microbatch, temperature, reference)
    if config.needs_old_forward:
        entropies = []
        for microbatch, part in zip(microbatches, columns, strict=True):
            if sampler:
                part["support_floor"], part["old_logprobs"], entropy = _restricted(policy, microbatch, sampler)
            else:
                part["old_logprobs"], entropy = policy_logprobs(policy, microbatch, temperature)
            entropies.append(entropy)
        choose_tokens(microbatches, columns, entropies, config, seed=seed)
    return columns


@torch.no_grad()
def policy_logprobs(policy: Policy, microbatch: Microbatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies of the present policy, without gradient: float32 [N] each."""
    return _logprobs(policy, microbatch, temperature)


@torch.no_grad()
def _restricted(policy: Policy, microbatch: Microbatch, sampler: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """`support_floor` of the present policy, its logprobs and entropies among the tokens inside: float32 [N] each."""
    hidden, weight, targets = policy.hidden(microbatch), policy.head_weight, microbatch.targets
    floor = support_floor(hidden, weight, targets, sampler, policy.softcap)
    support = sampler_support(hidden, weight, targets, sampler, floor, policy.softcap)
    options = {"temperature": sampler.temperature, "softcap": policy.softcap, "support": support}
    return floor, *linear_logprobs(hidden, weight, targets, **options)


def reference_logprobs(
    policy: Policy, microbatch: Microbatch, temperature: float, reference: Policy | None = None
) -> Tensor:
    """float32 [N], without gradient: those of `reference`, or (None) of the policy's base with the adapter off."""
    if reference is not None:
        return policy_logprobs(reference, microbatch, temperature)[0]
    with policy.reference():
        return _logprobs(policy, microbatch, temperature)[0]


def _logprobs(policy: Policy, microbatch: Microbatch, temperature: float) -> tuple[Tensor, Tensor]:
    hidden, weight, targets = policy.hidden(microbatch), policy.head_weight, microbatch.targets
    return linear_logprobs(hidden, weight, targets, temperature=temperature, softcap=policy.softcap)
