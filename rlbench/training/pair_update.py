"""All updates made from the preference pairs of one batch of rollouts.

Shapes: B completions of one microbatch, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlbench.config.preference import PreferenceConfig
from rlbench.data.packing import pack
from rlbench.models.policy import Policy
from rlbench.records import TrainingSample
from rlbench.training.microbatch_budget import MicrobatchBudget
from rlbench.training.preference_step import PreferenceBatch, batch_ref_logps, preference_step
from rlbench.training.update import UpdateResult, merge_metrics, split_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOptions:
    """What the updates need besides the losses.

    Example:
        PairOptions(num_updates=2, temperature=1.0, max_grad_norm=1.0)
    """

    num_updates: int  # algorithm.num_updates
    temperature: float  # of sampling
    max_grad_norm: float  # optim.max_grad_norm


def make_pair_batches(
    samples: Sequence[TrainingSample],
    pairs: Sequence[tuple[int, int]],
    *,
    num_minibatches: int,
    tokens_per_microbatch: int,
    device: torch.device,
) -> list[PreferenceBatch]:
    """Split a batch between groups and pack each part: a completion once, however many pairs it is in.

    Args:
        samples: those that are in a pair, samples of a group next to each other.
        pairs: places in `samples` of chosen and rejected.
        num_minibatches: algorithm.num_minibatches; empty parts are left out.

    Raises:
        ValueError: a sample exceeds `tokens_per_microbatch`.
    """
    batches = []
    for part in split_groups(samples, num_minibatches):
        if not part:
            continue
        microbatches = pack(part, tokens_per_microbatch=tokens_per_microbatch, device=device)
        packed = [sample for microbatch in microbatches for sample in microbatch.samples]
        places = {id(sample): place for place, sample in enumerate(packed)}  # equal completions are told apart
        own = [
            (places[id(samples[chosen])], places[id(samples[rejected])])
            for chosen, rejected in pairs
            if id(samples[chosen]) in places
        ]
        batches.append(PreferenceBatch(microbatches=microbatches, pairs=torch.tensor(own, device=device)))
    return batches


def update_on_pairs(
    policy: Policy,
    batches: Sequence[PreferenceBatch],
    optimizer: torch.optim.Optimizer,
    config: PreferenceConfig,
    options: PairOptions,
    *,
    reference: Policy | None = None,
    budget: MicrobatchBudget | None = None,
) -> UpdateResult:
    """Make `num_updates` optimizer steps; update i takes batch i modulo their number.

    `kl/reference` is the mean of log policy / reference over the tokens of the pairs' completions, before the first
    update; absent where no loss needs the reference.

    Args:
        policy: its adapter is updated.
        batches: of `make_pair_batches`, at least one.
        optimizer: over `policy.parameters()`, learning rate set.
        config: the `preference` part of the config.
        reference: None: the policy's base with the adapter off.
        budget: as in `train_step`.

    Raises:
        RunMemoryError: not even one completion a microbatch fits.
    """
    ref_logps = [
        batch_ref_logps(policy, batch, config, None, frozen=reference, temperature=options.temperature)
        for batch in batches
    ]
    steps: list[dict[str, float]] = []
    logprobs: list[Tensor] = []
    is_finite, num_applied = True, 0
    for index in range(options.num_updates):
        part = index % len(batches)
        result = preference_step(
            policy,
            batches[part],
            optimizer,
            config,
            max_grad_norm=options.max_grad_norm,
            reference=None,
            ref_logps=ref_logps[part],
            temperature=options.temperature,
            budget=budget,
        )
        steps.append(result.metrics)
        if index == 0:
            logprobs = result.logprobs
            if config.needs_reference:
                result.metrics["kl/reference"] = _mean_log_ratio(logprobs, ref_logps[0])
        is_finite = result.is_applied
        if not is_finite:
            break
        num_applied += 1
    return UpdateResult(
        num_applied=num_applied,
        is_finite=is_finite,
        metrics=merge_metrics(steps),
        microbatches=batches[0].microbatches,
        logprobs=logprobs,
    )


def _mean_log_ratio(logprobs: Sequence[Tensor], ref_logps: Sequence[Tensor]) -> float:
    num_tokens = sum(len(part) for part in logprobs)
    total = sum(float(part.sum()) for part in logprobs) - sum(float(part.sum()) for part in ref_logps)
    return total / num_tokens
