"""One microbatch's part of a step, as plan and preflight measure it: forwards that credit needs, and updates."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch

from rlbench.build import BaseParts, Inputs, Parts, training_sampling
from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.schema import RunConfig
from rlbench.data.packing import Microbatch
from rlbench.models.full_policy import FullPolicy
from rlbench.models.moments import MomentBytes
from rlbench.records import TrainingSample
from rlbench.training.optim import moment_bytes
from rlbench.training.step import count_totals, fixed_columns, policy_logprobs, reference_logprobs, train_step
from rlbench.training.support import support_sampler
from rlbench.training.update import Minibatch
from rlbench.training.value_step import update_critic


def with_returns(sample: TrainingSample, config: RunConfig) -> TrainingSample:
    """The sample with values and returns, where a critic learns them; which ones changes neither time nor memory."""
    if not config.algorithm.has_critic:
        return sample
    zeros = (0.0,) * len(sample.token_ids)
    return replace(sample, values=zeros, returns=zeros)


class WorkTime(NamedTuple):
    """Seconds of one microbatch's part of a step, the device synchronised.

    Example:
        WorkTime(before_s=0.4, update_s=2.1).of_batch(config.algorithm)
    """

    before_s: float  # once a batch: the forwards without gradient
    update_s: float  # each time that an update takes it

    def of_batch(self, config: AlgorithmConfig) -> float:
        """Seconds over all updates of a batch; each of them takes one minibatch."""
        return self.before_s + self.update_s * config.num_updates / config.num_minibatches


def work_on(parts: Parts, inputs: Inputs, microbatch: Microbatch) -> WorkTime:
    """Do it once: the penalty's, the teacher's and the old policy's forwards and the critic's values; then the
    critic's and the policy's update.

    Args:
        parts: policy and critic change as far as their learning rates say.
        inputs: of the run.
        microbatch: of samples from `with_returns`.
    """
    algorithm, temperature = inputs.config.algorithm, inputs.config.sampling.temperature
    max_grad_norm = inputs.config.optim.max_grad_norm
    sampler = support_sampler(training_sampling(inputs), algorithm)
    start = _now(parts)
    if algorithm.has_kl_reward or algorithm.has_teacher:
        other = parts.teacher if algorithm.has_teacher else parts.reference
        policy_logprobs(parts.policy, microbatch, temperature)
        reference_logprobs(parts.policy, microbatch, temperature, other)
    if parts.critic is not None:
        with torch.no_grad():
            parts.critic.values(microbatch)
    columns = fixed_columns(
        parts.policy,
        [microbatch],
        algorithm,
        temperature=temperature,
        seed=0,
        reference=parts.reference,
        sampler=sampler,
    )
    between = _now(parts)
    if parts.critic is not None and parts.critic_optimizer is not None:
        update_critic(
            parts.critic,
            [Minibatch(microbatches=[microbatch], totals=count_totals([microbatch]))],
            parts.critic_optimizer,
            num_updates=1,
            clip_value=algorithm.critic.clip_value,
            max_grad_norm=max_grad_norm,
        )
    train_step(
        parts.policy,
        [microbatch],
        parts.optimizer,
        algorithm,
        temperature=temperature,
        max_grad_norm=max_grad_norm,
        columns=columns,
        sampler=sampler,
    )
    return WorkTime(before_s=between - start, update_s=_now(parts) - between)


def _now(parts: Parts) -> float:
    if parts.policy.device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def adapter_bytes(parts: BaseParts) -> int:
    """Of all that is trained."""
    critic = parts.critic.parameters() if isinstance(parts, Parts) and parts.critic is not None else []
    return sum(p.numel() * p.element_size() for p in chain(parts.policy.parameters(), critic))


def all_moments(parts: BaseParts, config: RunConfig) -> MomentBytes:
    """Of all that is trained."""
    moments = moment_bytes(parts.policy.parameters(), config.optim, tables=parts.policy.table_parameters())
    critic = parts.critic.parameters() if isinstance(parts, Parts) and parts.critic is not None else []
    return moments + moment_bytes(critic, config.optim)


def beside_weights(parts: BaseParts) -> dict[str, int] | None:
    """Bytes of float32 masters and of a frozen copy of a run of all weights; None: an adapter is trained."""
    return parts.policy.beside_weights() if isinstance(parts.policy, FullPolicy) else None
