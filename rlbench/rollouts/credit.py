"""Rollout groups become training samples: advantages, and what is left out and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlbench.algorithms import ADVANTAGES
from rlbench.config.schema import AlgorithmConfig, RewardsConfig
from rlbench.records import Rollout, RolloutGroup, TrainingSample


class RewardFailure(Exception):
    """Too many rollouts got no reward: the verifier is broken, going on would train on what is left by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    samples: tuple[TrainingSample, ...]
    advantages: dict[str, float]  # by rollout_id, of every rollout that has a reward
    num_no_signal_groups: int
    num_invalid_rollouts: int  # without a reward


def credit(groups: Sequence[RolloutGroup], algorithm: AlgorithmConfig, rewards: RewardsConfig) -> Credit:
    """Advantages of each group's valid rollouts; groups without signal give no samples and are counted.

    A group has no signal when all its rewards are equal or fewer than two rollouts have one.

    Raises:
        RewardFailure: a rollout has no reward and `rewards.on_invalid` is stop, or more than
            `rewards.max_invalid_frac` of the rollouts have none.
    """
    num_rollouts = sum(len(group.rollouts) for group in groups)
    invalid = [rollout for group in groups for rollout in group.rollouts if rollout.reward is None]
    _check_invalid(invalid, num_rollouts, rewards)
    samples: list[TrainingSample] = []
    advantages: dict[str, float] = {}
    num_no_signal = 0
    for group in groups:
        valid = [rollout for rollout in group.rollouts if rollout.reward is not None]
        is_dropped = len(valid) < len(group.rollouts) and rewards.on_invalid == "drop_group"
        if is_dropped or len(valid) < 2:
            num_no_signal += 1
            continue
        values = ADVANTAGES[algorithm.advantage](group.rewards, scale_by_std=algorithm.scale_by_std)
        advantages |= {rollout.rollout_id: value for rollout, value in zip(valid, values, strict=True)}
        if not any(values):
            num_no_signal += 1
            continue
        samples += [_sample(rollout, value) for rollout, value in zip(valid, values, strict=True)]
    return Credit(
        samples=tuple(samples),
        advantages=advantages,
        num_no_signal_groups=num_no_signal,
        num_invalid_rollouts=len(invalid),
    )


def _sample(rollout: Rollout, advantage: float) -> TrainingSample:
    length = len(rollout.completion.token_ids)
    return TrainingSample(
        group_id=rollout.prompt.prompt_id,
        prompt_token_ids=rollout.prompt.token_ids,
        token_ids=rollout.completion.token_ids,
        sampling_logprobs=rollout.completion.sampling_logprobs,
        plain_logprobs=rollout.completion.plain_logprobs,
        advantages=(advantage,) * length,
        loss_mask=(True,) * length,
    )


def _check_invalid(invalid: Sequence[Rollout], num_rollouts: int, rewards: RewardsConfig) -> None:
    if not invalid:
        return
    share = len(invalid) / num_rollouts
    if rewards.on_invalid != "stop" and share <= rewards.max_invalid_frac:
        return
    name, component = next((n, c) for n, c in invalid[0].components.items() if c.value is None)
    raise RewardFailure(
        f"{len(invalid)} of {num_rollouts} rollouts have no reward (rewards.on_invalid={rewards.on_invalid}, "
        f"rewards.max_invalid_frac={rewards.max_invalid_frac}); the first is {invalid[0].rollout_id}: "
        f"{name} ended in {component.status}: {component.message}"
    )
