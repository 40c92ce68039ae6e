"""All updates made from one batch of rollouts: minibatches, what is left out of the forward, fixed columns, steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlbench.algorithms.entropy_control import EntropyControl
from rlbench.algorithms.reduce import BatchTotals
from rlbench.config.algorithm import AlgorithmConfig
from rlbench.data.packing import Microbatch, pack
from rlbench.models.policy import Policy
from rlbench.records import SamplingParams, TrainingSample
from rlbench.training.microbatch_budget import MicrobatchBudget
from rlbench.training.step import fixed_columns, train_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """The data of one update."""

    microbatches: list[Microbatch]  # of the samples that matter for the gradient; may be empty
    totals: BatchTotals  # of all samples


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    num_applied: int  # optimizer steps
    is_finite: bool  # False: the last step had no finite loss or gradient and was not made, nor were those after it
    metrics: dict[str, float]  # means over the steps; maxima where the name ends in _max
    microbatches: list[Microbatch]  # that were trained on
    logprobs: list[Tensor]  # of each, float32 [N]: the trainer's before the batch's first update


def make_minibatches(
    samples: Sequence[TrainingSample],
    config: AlgorithmConfig,
    *,
    tokens_per_microbatch: int,
    max_completion_tokens: int,
    device: str | torch.device,
) -> list[Minibatch]:
    """Split a batch between groups into `num_minibatches` parts of about equally many groups, and pack each.

    Samples whose tokens have no advantage are left out of the forward where no other term needs them; they stay in
    the denominators, so the gradient is the same.

    Args:
        samples: the whole batch, samples of a group next to each other.
        max_completion_tokens: sampling.max_tokens.

    Raises:
        ValueError: a sample exceeds `tokens_per_microbatch`.
    """
    return [
        Minibatch(
            microbatches=pack(kept, tokens_per_microbatch=tokens_per_microbatch, device=device) if kept else [],
            totals=BatchTotals(
                num_loss_tokens=sum(sum(sample.loss_mask) for sample in part),
                num_sequences=len(part),
                max_completion_tokens=max_completion_tokens,
            ),
        )
        for part in split_groups(samples, config.num_minibatches)
        for kept in [[sample for sample in part if _matters(sample, config)]]
    ]


def update_policy(
    policy: Policy,
    minibatches: Sequence[Minibatch],
    optimizer: torch.optim.Optimizer,
    config: AlgorithmConfig,
    *,
    temperature: float,
    max_grad_norm: float,
    entropy_control: EntropyControl,
    seed: int,
    reference: Policy | None = None,
    budget: MicrobatchBudget | None = None,
    sampler: SamplingParams | None = None,
) -> UpdateResult:
    """Make `config.num_updates` optimizer steps from a batch; update i takes minibatch i modulo their number.

    Args:
        policy: its adapter is updated.
        minibatches: from `make_minibatches`; an empty one is passed over.
        optimizer: over `policy.parameters()`, learning rate set.
        config: the `algorithm` part of the config.
        temperature: of sampling.
        max_grad_norm: see `train_step`.
        entropy_control: read before each step, told the entropy after it.
        seed: of the random choice that some losses make.
        reference: as in `reference_logprobs`.
        budget, sampler: as in `train_step`.
    """
    columns = _columns(policy, minibatches, config, temperature, seed, reference, sampler)
    before: dict[int, list[Tensor]] = {}  # by minibatch
    steps: list[dict[str, float]] = []
    is_finite, num_applied = True, 0
    for index in range(config.num_updates):
        part = index % len(minibatches)
        if not minibatches[part].microbatches:
            continue
        result = train_step(
            policy,
            minibatches[part].microbatches,
            optimizer,
            config,
            temperature=temperature,
            max_grad_norm=max_grad_norm,
            totals=minibatches[part].totals,
            columns=columns[part],
            entropy_coef=entropy_control.applied,
            budget=budget,
            sampler=sampler,
        )
        # without them no step came before this one
        own = zip(columns[part], result.logprobs, strict=True)
        before.setdefault(part, [fixed.get("old_logprobs", logprobs) for fixed, logprobs in own])
        steps.append(result.metrics)
        is_finite = result.is_applied
        if not is_finite:
            break
        num_applied += 1
        if config.has_entropy_bonus:
            entropy_control.observe(result.metrics["entropy/bonus_tokens_mean"])
            result.metrics["entropy/coef"] = entropy_control.coef
    return UpdateResult(
        num_applied=num_applied,
        is_finite=is_finite,
        metrics=merge_metrics(steps),
        microbatches=[microbatch for part in before for microbatch in minibatches[part].microbatches],
        logprobs=[logprobs for part in before.values() for logprobs in part],
    )


def _columns(
    policy: Policy,
    minibatches: Sequence[Minibatch],
    config: AlgorithmConfig,
    temperature: float,
    seed: int,
    reference: Policy | None,
    sampler: SamplingParams | None,
) -> list[list[dict[str, torch.Tensor]]]:
    """`fixed_columns` of the whole batch, for each minibatch: choices of tokens are made over all of it."""
    flat = [microbatch for minibatch in minibatches for microbatch in minibatch.microbatches]
    options = {"temperature": temperature, "seed": seed, "reference": reference, "sampler": sampler}
    columns = iter(fixed_columns(policy, flat, config, **options))
    return [[next(columns) for _ in minibatch.microbatches] for minibatch in minibatches]


def _matters(sample: TrainingSample, config: AlgorithmConfig) -> bool:
    if not any(sample.loss_mask):
        return False
    return config.needs_every_sample or any(sample.advantages)


def split_groups(samples: Sequence[TrainingSample], num_parts: int) -> list[list[TrainingSample]]:
    """Parts of about equally many groups; a group is not cut."""
    groups: dict[str, list[TrainingSample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    parts: list[list[TrainingSample]] = [[] for _ in range(num_parts)]
    for index, group in enumerate(groups.values()):
        parts[index * num_parts // len(groups)] += group
    return parts


def merge_metrics(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the steps; maxima where the name ends in _max."""
    names = dict.fromkeys(name for step in steps for name in step)
    merged = {}
    for name in names:
        values = [step[name] for step in steps if name in step]
        merged[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return merged
