"""Rollout groups become training samples: rewards shaped, advantages taken, and what is left out and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rlbench.algorithms import ADVANTAGES
from rlbench.algorithms.advantages import GroupReturns, are_equal
from rlbench.algorithms.gae import value_targets
from rlbench.algorithms.shaping import overlong_penalty, returns_to_go
from rlbench.config.algorithm import ADVANTAGES as ADVANTAGE_SPECS
from rlbench.config.schema import AlgorithmConfig, RewardsConfig
from rlbench.records import FINISH_LENGTH, RewardComponent, Rollout, RolloutGroup, StateValues, TrainingSample


class RewardFailure(Exception):
    """Too many rollouts got no reward, so that going on would train on what is left by chance; or one that does not fit
    the advantage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """`samples` are all rollouts that can be compared, those without advantage too: they count in denominators.

    With `algorithm.pairs` they are the rollouts that are in a pair, and have no advantages.
    """

    samples: tuple[TrainingSample, ...]
    pairs: tuple[tuple[int, int], ...] = ()  # places in `samples` of chosen and rejected
    advantages: dict[str, float]  # by rollout_id, of every sample; the mean over its tokens
    num_no_signal_groups: int
    num_invalid_rollouts: int  # without a reward
    metrics: dict[str, float]
    has_other_terms: bool = False  # the objective has terms that no advantage multiplies: KL in the loss, entropy

    @property
    def has_signal(self) -> bool:
        """There is a pair, or some trained token has an advantage, teaches the critic, or is in another term."""
        return bool(self.pairs) or any(
            any(sample.loss_mask)
            and (self.has_other_terms or any(sample.advantages) or sample.values != sample.returns)
            for sample in self.samples
        )


def credit(
    groups: Sequence[RolloutGroup],
    algorithm: AlgorithmConfig,
    rewards: RewardsConfig,
    *,
    max_completion_tokens: int | None = None,
    token_kl: Mapping[str, Sequence[float]] | None = None,
    state_values: Mapping[str, StateValues] | None = None,
    teacher_gaps: Mapping[str, Sequence[float]] | None = None,
) -> Credit:
    """Advantages of the step's rollouts that have a reward and tokens.

    A group has no signal when all its advantages are 0, or when fewer of its rollouts are left than the advantage
    compares. The latter, and with dynamic sampling both, give no samples.

    Args:
        groups: of one step.
        algorithm: the `algorithm` part of the config.
        rewards: the `rewards` part.
        max_completion_tokens: sampling.max_tokens; needed with a soft penalty on long completions.
        token_kl: KL to the reference of each token, by rollout_id; with a KL penalty in the reward.
        state_values: of a critic, by rollout_id; with an advantage that needs one.
        teacher_gaps: log student - log teacher of each token, by rollout_id; with an advantage that needs a teacher.

    Raises:
        ValueError: the advantage needs a critic or a teacher, and there are no `state_values` or `teacher_gaps`.
        RewardFailure: a rollout has no reward and `rewards.on_invalid` is stop, or more than
            `rewards.max_invalid_frac` of the rollouts have none; or a reward is negative, with an advantage that is
            not defined there.
    """
    if algorithm.has_critic and state_values is None:
        raise ValueError(
            f"algorithm.advantage is {algorithm.advantage}, which needs the values of the run's critic; recorded "
            "rollouts have none: expected an advantage of rewards alone, e.g. group_relative"
        )
    if algorithm.has_teacher and teacher_gaps is None:
        raise ValueError(
            f"algorithm.advantage is {algorithm.advantage}, which needs the logprobs of the run's teacher; recorded "
            "rollouts have none: expected an advantage of rewards, e.g. group_relative"
        )
    num_rollouts = sum(len(group.rollouts) for group in groups)
    invalid = [rollout for group in groups for rollout in group.rollouts if rollout.reward is None]
    check_invalid(invalid, num_rollouts, rewards)
    compared = [part for group in groups if (part := comparable(group, algorithm, rewards))]
    _check_negative([rollout for part in compared for rollout in part], algorithm)
    penalties = _overlong_penalties(compared, algorithm, max_completion_tokens)
    returns = [_returns(part, penalties, algorithm, token_kl, state_values, teacher_gaps) for part in compared]
    values = ADVANTAGES[algorithm.advantage](returns, **_options(algorithm))
    targets = value_targets(returns, **algorithm.target_options()) if algorithm.has_critic else None
    samples: list[TrainingSample] = []
    advantages: dict[str, float] = {}
    num_no_signal = len(groups) - len(compared)
    for index, (rollouts, of_group) in enumerate(zip(compared, values, strict=True)):
        advantages |= {r.rollout_id: _mean(tokens) for r, tokens in zip(rollouts, of_group, strict=True)}
        has_signal = any(any(tokens) for tokens in of_group)
        num_no_signal += not has_signal
        if has_signal or not algorithm.max_refills:
            learned = targets[index] if targets is not None else [()] * len(rollouts)
            samples += [
                make_sample(rollout, tokens, algorithm, state_values, of_critic)
                for rollout, tokens, of_critic in zip(rollouts, of_group, learned, strict=True)
            ]
    return Credit(
        samples=tuple(samples),
        advantages=advantages,
        num_no_signal_groups=num_no_signal,
        num_invalid_rollouts=len(invalid),
        metrics=_metrics(samples, penalties, {"kl/reference": token_kl, "kl/teacher": teacher_gaps}),
        has_other_terms=algorithm.has_kl_loss or algorithm.has_entropy_bonus,
    )


def has_signal(
    group: RolloutGroup, algorithm: AlgorithmConfig, rewards: RewardsConfig, *, max_completion_tokens: int
) -> bool:
    """Whether the group's rewards, penalties on length included, differ: what dynamic sampling draws prompts for."""
    shaped = shaped_rewards(group, algorithm, rewards, max_completion_tokens=max_completion_tokens)
    return any(not are_equal([v for v in values if v is not None]) for values in zip(*shaped, strict=True))


def shaped_rewards(
    group: RolloutGroup, algorithm: AlgorithmConfig, rewards: RewardsConfig, *, max_completion_tokens: int
) -> list[tuple[float | None, ...]]:
    """What the advantages of the group compare, one for each `comparable` rollout: the reward with its penalty on
    length and, where they are read apart, the components. Empty if the group is dropped or too small."""
    rollouts = comparable(group, algorithm, rewards)
    penalties = _overlong_penalties([rollouts], algorithm, max_completion_tokens)
    reads_components = ADVANTAGE_SPECS[algorithm.advantage].reads_components
    return [
        ((r.reward or 0.0) + penalties.get(r.rollout_id, 0.0), *_component_values(r, reads_components))
        for r in rollouts
    ]


def _component_values(rollout: Rollout, are_read: bool) -> list[float | None]:
    return [component.value for component in rollout.components.values()] if are_read else []


def comparable(group: RolloutGroup, algorithm: AlgorithmConfig, rewards: RewardsConfig) -> list[Rollout]:
    """The group's rollouts that have a reward and tokens; none if the group is dropped or too few are left."""
    found = [rollout for rollout in group.rollouts if rollout.is_comparable]
    is_dropped = len(group.rewards) < len(group.rollouts) and rewards.on_invalid == "drop_group"
    is_too_small = len(found) < ADVANTAGE_SPECS[algorithm.advantage].min_group_size
    return [] if is_dropped or is_too_small else found


def _options(algorithm: AlgorithmConfig) -> dict[str, Any]:
    default = ADVANTAGE_SPECS[algorithm.advantage].default_scale
    scale = {} if default is None else {"scale": algorithm.advantage_scale or default}
    gamma = {"gamma": algorithm.teacher.gamma} if algorithm.has_teacher else {}
    return scale | gamma | (algorithm.gae_options() if algorithm.has_critic else {})


def _overlong_penalties(
    groups: Sequence[Sequence[Rollout]], algorithm: AlgorithmConfig, max_completion_tokens: int | None
) -> dict[str, float]:
    """By rollout_id; empty without a soft penalty."""
    if not algorithm.overlong_buffer_tokens:
        return {}
    assert max_completion_tokens is not None
    penalty = 1.0 if algorithm.overlong_penalty is None else algorithm.overlong_penalty
    return {
        rollout.rollout_id: overlong_penalty(
            len(rollout.completion.token_ids),
            max_tokens=max_completion_tokens,
            buffer_tokens=algorithm.overlong_buffer_tokens,
            penalty=penalty,
        )
        for group in groups
        for rollout in group
    }


def _returns(
    rollouts: Sequence[Rollout],
    penalties: Mapping[str, float],
    algorithm: AlgorithmConfig,
    token_kl: Mapping[str, Sequence[float]] | None,
    state_values: Mapping[str, StateValues] | None,
    teacher_gaps: Mapping[str, Sequence[float]] | None,
) -> GroupReturns:
    returns = []
    for rollout in rollouts:
        assert rollout.reward is not None
        reward = rollout.reward + penalties.get(rollout.rollout_id, 0.0)
        kl = token_kl[rollout.rollout_id] if token_kl is not None else [0.0] * len(rollout.completion.token_ids)
        returns.append(returns_to_go(reward, kl, algorithm.kl_coef if token_kl is not None else 0.0))
    components: dict[str, list[float | None]] = {
        name: [r.components[name].value for r in rollouts] for name in rollouts[0].components
    }
    weights = {name: component.weight for name, component in rollouts[0].components.items()}
    if penalties:  # a reward of its own for advantages that read each reward apart
        components["overlong"] = [penalties[r.rollout_id] for r in rollouts]
        weights["overlong"] = 1.0
    of_critic = [state_values[r.rollout_id] for r in rollouts] if state_values is not None else []
    return GroupReturns(
        returns=returns,
        components=components,
        weights=weights,
        values=[found.values for found in of_critic],
        last_values=[found.last for found in of_critic],
        teacher_gaps=[teacher_gaps[r.rollout_id] for r in rollouts] if teacher_gaps is not None else [],
    )


def make_sample(
    rollout: Rollout,
    advantages: Sequence[float],
    algorithm: AlgorithmConfig,
    state_values: Mapping[str, StateValues] | None = None,
    returns: Sequence[float] = (),
) -> TrainingSample:
    """The rollout with its credit."""
    completion = rollout.completion
    is_trained = not (algorithm.mask_truncated and completion.finish_reason == FINISH_LENGTH)
    return TrainingSample(
        group_id=rollout.prompt.prompt_id,
        prompt_token_ids=rollout.prompt.token_ids,
        token_ids=completion.token_ids,
        sampling_logprobs=completion.sampling_logprobs,
        plain_logprobs=completion.plain_logprobs,
        advantages=tuple(advantages),
        loss_mask=(is_trained,) * len(completion.token_ids),
        values=state_values[rollout.rollout_id].values if state_values is not None else (),
        returns=tuple(returns),
        is_replayed=rollout.replay_age is not None,
    )


def _metrics(
    samples: Sequence[TrainingSample],
    penalties: Mapping[str, float],
    token_values: Mapping[str, Mapping[str, Sequence[float]] | None],
) -> dict[str, float]:
    """
    Args:
        token_values: by name of the metric, values of each token by rollout_id, whose mean is taken.
    """
    metrics: dict[str, float] = {}
    if samples:
        metrics["rollouts/masked_frac"] = fmean(not any(sample.loss_mask) for sample in samples)
    if penalties:
        metrics["completion/overlong_penalty_mean"] = fmean(penalties.values())
    for name, by_rollout in token_values.items():
        if by_rollout:
            metrics[name] = fmean(value for tokens in by_rollout.values() for value in tokens)
    return metrics


def _mean(tokens: Sequence[float]) -> float:
    return tokens[0] if min(tokens) == max(tokens) else fmean(tokens)


def _what_happened(component: RewardComponent) -> str:
    if component.status == "skipped":
        return "returned None (it does not apply to the row), and no other reward gave a value"
    return f"ended in {component.status}: {component.message}"


def check_invalid(invalid: Sequence[Rollout], num_rollouts: int, rewards: RewardsConfig) -> None:
    if not invalid:
        return
    share = len(invalid) / num_rollouts
    if rewards.on_invalid != "stop" and share <= rewards.max_invalid_frac:
        return
    without_value = [(n, c) for n, c in invalid[0].components.items() if c.value is None]
    name, component = max(without_value, key=lambda item: item[1].status != "skipped")
    raise RewardFailure(
        f"{len(invalid)} of {num_rollouts} rollouts have no reward (rewards.on_invalid={rewards.on_invalid}, "
        f"rewards.max_invalid_frac={rewards.max_invalid_frac}); the first is {invalid[0].rollout_id}: "
        f"{name} {_what_happened(component)}"
    )


def _check_negative(rollouts: Sequence[Rollout], algorithm: AlgorithmConfig) -> None:
    if not algorithm.refuses_negative_rewards:
        return
    for rollout in rollouts:
        if rollout.reward is not None and rollout.reward < 0:
            raise RewardFailure(
                f"algorithm.advantage is {algorithm.advantage}, but the reward of {rollout.rollout_id} is "
                f"{rollout.reward:g}; expected rewards of at least 0, or another advantage"
            )
