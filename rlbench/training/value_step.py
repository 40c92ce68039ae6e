"""The critic's part of a step: values of all states before the update, and its own updates.

Shapes: N loss positions of one microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlbench.algorithms.value_losses import clipped_value_loss, explained_variance
from rlbench.data.packing import Microbatch, pack, with_next_token
from rlbench.models.value_head import Critic
from rlbench.records import FINISH_LENGTH, RolloutGroup, StateValues, TrainingSample
from rlbench.training.microbatch_budget import MicrobatchBudget, split_microbatches
from rlbench.training.reference_kl import unscored_sample
from rlbench.training.update import Minibatch


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticResult:
    is_finite: bool  # False: the last step had no finite loss or gradient and was not made, nor were those after it
    metrics: dict[str, float]

    @property
    def shown(self) -> dict[str, float]:
        """Loss and gradient norm, under the names that a warning about them reads."""
        return {"loss/total": self.metrics["value/loss"], "optim/grad_norm": self.metrics["value/grad_norm"]}


@torch.no_grad()
def state_values(
    critic: Critic, groups: Sequence[RolloutGroup], *, bootstrap_truncated: bool, tokens_per_microbatch: int
) -> dict[str, StateValues]:
    """Values of the states of every rollout that has a reward and tokens, by rollout_id.

    Args:
        critic: before its update.
        groups: of one step.
        bootstrap_truncated: completions cut at the token limit have the value of the state after their last token as
            `last`; without it, and for all others, it is 0.
        tokens_per_microbatch: packed tokens of one forward.

    Raises:
        ValueError: a rollout exceeds `tokens_per_microbatch`.
    """
    samples: dict[str, TrainingSample] = {}
    for rollout in (r for group in groups for r in group.rollouts if r.is_comparable):
        sample = unscored_sample(rollout)
        if bootstrap_truncated and rollout.completion.finish_reason == FINISH_LENGTH:
            sample = with_next_token(sample)
        samples[rollout.rollout_id] = sample
    # The state after a completion takes one row more than a training microbatch has for it.
    budget = tokens_per_microbatch + int(bootstrap_truncated)
    by_sample: dict[TrainingSample, list[float]] = {}  # equal samples have equal values
    for microbatch in pack(list(samples.values()), tokens_per_microbatch=budget, device=critic.device):
        lengths = torch.bincount(microbatch.sequence_ids).tolist()
        for sample, values in zip(microbatch.samples, critic.values(microbatch).split(lengths), strict=True):
            by_sample[sample] = values.tolist()
    found = {}
    for group in groups:
        for rollout in (r for r in group.rollouts if r.rollout_id in samples):
            values, num_tokens = by_sample[samples[rollout.rollout_id]], len(rollout.completion.token_ids)
            last = values[num_tokens] if len(values) > num_tokens else 0.0
            found[rollout.rollout_id] = StateValues(values=tuple(values[:num_tokens]), last=last)
    return found


def update_critic(
    critic: Critic,
    minibatches: Sequence[Minibatch],
    optimizer: torch.optim.Optimizer,
    *,
    num_updates: int,
    clip_value: float | None,
    max_grad_norm: float,
    budget: MicrobatchBudget | None = None,
) -> CriticResult:
    """Make `num_updates` optimizer steps from a batch; update i takes minibatch i modulo their number.

    Args:
        critic: its adapter and head are updated.
        minibatches: of `make_minibatches`, with values and returns.
        optimizer: over `critic.parameters()`, learning rate set.
        num_updates: as of the policy.
        clip_value: as in `clipped_value_loss`.
        max_grad_norm: of the critic's gradient apart; 0 does not clip.
        budget: as in `train_step`.

    Raises:
        RunMemoryError: not even one sample a microbatch fits.
    """
    metrics = _of_batch(minibatches)
    steps: list[dict[str, float]] = []
    is_finite = True
    for index in range(num_updates):
        microbatches = minibatches[index % len(minibatches)].microbatches
        if not microbatches:
            continue
        step = _critic_step(
            critic, microbatches, optimizer, clip_value=clip_value, max_grad_norm=max_grad_norm, budget=budget
        )
        steps.append(step)
        is_finite = math.isfinite(step["value/loss"]) and math.isfinite(step["value/grad_norm"])
        if not is_finite:
            break
    metrics |= {name: sum(step[name] for step in steps) / len(steps) for name in (steps[0] if steps else {})}
    return CriticResult(is_finite=is_finite, metrics=metrics)


def _critic_step(
    critic: Critic,
    microbatches: Sequence[Microbatch],
    optimizer: torch.optim.Optimizer,
    *,
    clip_value: float | None,
    max_grad_norm: float,
    budget: MicrobatchBudget | None,
) -> dict[str, float]:
    num_loss_tokens = max(1, sum(int(microbatch.loss_mask.sum()) for microbatch in microbatches))

    def accumulate(tokens: int | None) -> tuple[float, float]:
        optimizer.zero_grad(set_to_none=True)
        loss_sum = clip_sum = 0.0
        for microbatch in microbatches if tokens is None else split_microbatches(microbatches, tokens):
            loss, clip_frac = clipped_value_loss(
                critic.values(microbatch),
                microbatch.values,
                microbatch.returns,
                microbatch.loss_mask,
                clip_value=clip_value,
                num_loss_tokens=num_loss_tokens,
            )
            loss.backward()
            loss_sum, clip_sum = loss_sum + float(loss.detach()), clip_sum + float(clip_frac)
        return loss_sum, clip_sum

    samples = [[sample] for microbatch in microbatches for sample in microbatch.samples]
    loss_sum, clip_sum = budget.attempt(samples, accumulate) if budget else accumulate(None)
    grad_norm = float(torch.nn.utils.clip_grad_norm_(critic.parameters(), max_grad_norm or math.inf))
    if math.isfinite(grad_norm) and math.isfinite(loss_sum):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"value/loss": loss_sum, "value/clip_frac": clip_sum, "value/grad_norm": grad_norm}


def _of_batch(minibatches: Sequence[Minibatch]) -> dict[str, float]:
    """Of the values before the update; `value/explained_var` only where returns differ."""
    parts = [mb for minibatch in minibatches for mb in minibatch.microbatches]
    values = torch.cat([mb.values[mb.loss_mask] for mb in parts]) if parts else torch.empty(0)
    returns = torch.cat([mb.returns[mb.loss_mask] for mb in parts]) if parts else torch.empty(0)
    if not len(values):
        return {}
    explained = explained_variance(values, returns)
    metrics = {"value/mean": float(values.mean()), "value/return_mean": float(returns.mean())}
    return metrics if math.isnan(explained) else metrics | {"value/explained_var": explained}
