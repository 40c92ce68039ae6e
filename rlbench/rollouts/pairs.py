"""Rollout groups become preference pairs: of two completions of a prompt the one with the higher reward is chosen.

Source: Guo et al. 2024, arXiv:2402.04792 (online DPO), with rewards in place of an annotator.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from rlbench.algorithms.advantages import are_equal
from rlbench.config.pairs import PairsConfig
from rlbench.config.schema import AlgorithmConfig, RewardsConfig
from rlbench.records import FINISH_LENGTH, Rollout, RolloutGroup, TrainingSample
from rlbench.rollouts.credit import Credit, check_invalid, comparable, make_sample, shaped_rewards

Pair = tuple[int, int]  # places of the chosen and of the rejected one


def pair_up(
    groups: Sequence[RolloutGroup],
    algorithm: AlgorithmConfig,
    rewards: RewardsConfig,
    *,
    max_completion_tokens: int,
) -> Credit:
    """The rollouts that are in a pair as samples, and the pairs; a group without any has no signal.

    Args:
        groups: of one step.
        algorithm: the `algorithm` part of the config.
        rewards: the `rewards` part.
        max_completion_tokens: sampling.max_tokens.

    Raises:
        RewardFailure: as in `credit`.
    """
    invalid = [rollout for group in groups for rollout in group.rollouts if rollout.reward is None]
    check_invalid(invalid, sum(len(group.rollouts) for group in groups), rewards)
    samples: list[TrainingSample] = []
    pairs: list[Pair] = []
    gaps: list[float] = []
    num_no_signal = 0
    for group in groups:
        rollouts, values = _ranked(group, algorithm, rewards, max_completion_tokens)
        own = choose_pairs(values, [r.completion.token_ids for r in rollouts], algorithm.pairs)
        num_no_signal += not own
        used = sorted({place for pair in own for place in pair})
        place_of = {place: len(samples) + index for index, place in enumerate(used)}
        samples += [make_sample(rollouts[i], [0.0] * len(rollouts[i].completion.token_ids), algorithm) for i in used]
        pairs += [(place_of[chosen], place_of[rejected]) for chosen, rejected in own]
        gaps += [values[chosen] - values[rejected] for chosen, rejected in own]
    metrics = {"pairs/num": float(len(pairs))}
    if gaps:
        metrics["pairs/reward_gap"] = sum(gaps) / len(gaps)
    return Credit(
        samples=tuple(samples),
        pairs=tuple(pairs),
        advantages={},
        num_no_signal_groups=num_no_signal,
        num_invalid_rollouts=len(invalid),
        metrics=metrics,
    )


def has_pair(
    group: RolloutGroup, algorithm: AlgorithmConfig, rewards: RewardsConfig, *, max_completion_tokens: int
) -> bool:
    """Whether the group makes a pair: what dynamic sampling draws prompts for."""
    rollouts, values = _ranked(group, algorithm, rewards, max_completion_tokens)
    return bool(choose_pairs(values, [r.completion.token_ids for r in rollouts], algorithm.pairs))


def choose_pairs(rewards: Sequence[float], token_ids: Sequence[Sequence[int]], config: PairsConfig) -> list[Pair]:
    """Places (chosen, rejected) whose rewards differ, by at least `min_gap`, and whose completions do too.

    A difference by rounding alone is none, and one that only rounding keeps below `min_gap` suffices. best_worst takes
    the first of the best and the first of the worst; all takes every two, the chosen one first.
    """
    found = [
        (chosen, rejected)
        for chosen, rejected in permutations(range(len(rewards)), 2)
        if _wins(rewards[chosen], rewards[rejected], config.min_gap)
        and tuple(token_ids[chosen]) != tuple(token_ids[rejected])
    ]
    if config.choice == "all" or not found:
        return found
    return [max(found, key=lambda pair: rewards[pair[0]] - rewards[pair[1]])]


def _wins(chosen: float, rejected: float, min_gap: float) -> bool:
    gap = chosen - rejected
    return gap > 0 and not are_equal([chosen, rejected]) and (gap >= min_gap or are_equal([chosen, rejected + min_gap]))


def _ranked(
    group: RolloutGroup, algorithm: AlgorithmConfig, rewards: RewardsConfig, max_completion_tokens: int
) -> tuple[list[Rollout], list[float]]:
    """The rollouts that may be in a pair, and their rewards less the penalty on length."""
    rollouts = comparable(group, algorithm, rewards)
    values = shaped_rewards(group, algorithm, rewards, max_completion_tokens=max_completion_tokens)
    kept = [
        (rollout, value[0] or 0.0)
        for rollout, value in zip(rollouts, values, strict=True)
        if not (algorithm.mask_truncated and rollout.completion.finish_reason == FINISH_LENGTH)
    ]
    return [rollout for rollout, _ in kept], [value for _, value in kept]
