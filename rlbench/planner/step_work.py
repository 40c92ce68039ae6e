"""One microbatch's part of a step, as plan and preflight measure it: forwards that credit needs, and updates."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import torch

from rlbench.build import BaseParts, Parts
from rlbench.config.schema import RunConfig
from rlbench.data.packing import Microbatch
from rlbench.records import TrainingSample
from rlbench.training.step import count_totals, policy_logprobs, reference_logprobs, train_step
from rlbench.training.update import Minibatch
from rlbench.training.value_step import update_critic


def with_returns(sample: TrainingSample, config: RunConfig) -> TrainingSample:
    """The sample with values and returns, where a critic learns them; which ones changes neither time nor memory."""
    if not config.algorithm.has_critic:
        return sample
    zeros = (0.0,) * len(sample.token_ids)
    return replace(sample, values=zeros, returns=zeros)


def work_on(parts: Parts, config: RunConfig, microbatch: Microbatch) -> None:
    """Do it once: the penalty's or the teacher's forwards, the critic's values and update, the policy's update.

    Args:
        parts: policy and critic change as far as their learning rates say.
        config: of the run, derived.
        microbatch: of samples from `with_returns`.
    """
    algorithm, temperature = config.algorithm, config.sampling.temperature
    if algorithm.has_kl_reward or algorithm.has_teacher:
        other = parts.teacher if algorithm.has_teacher else parts.reference
        policy_logprobs(parts.policy, microbatch, temperature)
        reference_logprobs(parts.policy, microbatch, temperature, other)
    if parts.critic is not None and parts.critic_optimizer is not None:
        with torch.no_grad():
            parts.critic.values(microbatch)
        update_critic(
            parts.critic,
            [Minibatch(microbatches=[microbatch], totals=count_totals([microbatch]))],
            parts.critic_optimizer,
            num_updates=1,
            clip_value=algorithm.critic.clip_value,
            max_grad_norm=config.optim.max_grad_norm,
        )
    train_step(
        parts.policy,
        [microbatch],
        parts.optimizer,
        algorithm,
        temperature=temperature,
        max_grad_norm=config.optim.max_grad_norm,
    )


def adapter_bytes(parts: BaseParts) -> int:
    """Of all that is trained."""
    critic = parts.critic.parameters() if isinstance(parts, Parts) and parts.critic is not None else []
    return sum(p.numel() * p.element_size() for p in chain(parts.policy.parameters(), critic))
