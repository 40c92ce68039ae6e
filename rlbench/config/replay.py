"""Replay of successes: what is kept of right answers, and what it cannot be combined with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlbench.config.checks import check_range

if TYPE_CHECKING:
    from rlbench.config.algorithm import AlgorithmConfig


@dataclass
class ReplayConfig:
    """A group without a right answer gets one that an earlier policy gave to the same prompt."""

    is_on: bool = False  # off: such a group teaches nothing about right answers
    component: str = "accuracy"  # the reward component that is 1 for a right answer
    num_per_group: int = 1  # completions of such a group whose place is taken, and successes kept of a prompt
    max_age: int = 64  # policy versions that may lie between sampling and training; older successes are forgotten
    max_prompts: int = 1024  # of which successes are kept; those that were answered right longest ago go first

    def __post_init__(self) -> None:
        check_range("algorithm.replay.num_per_group", self.num_per_group, low=1)
        check_range("algorithm.replay.max_age", self.max_age, low=1)
        check_range("algorithm.replay.max_prompts", self.max_prompts, low=1)


def check_replay(algorithm: AlgorithmConfig) -> None:
    """
    Raises:
        ValueError: replay is on, with settings that would read a replayed completion as one of the present policy.
    """
    replay = algorithm.replay
    if not replay.is_on:
        return
    if algorithm.group_size is not None and replay.num_per_group >= algorithm.group_size:
        raise ValueError(
            f"algorithm.replay.num_per_group is {replay.num_per_group}, expected less than algorithm.group_size "
            f"({algorithm.group_size}): a success teaches beside completions of the present policy"
        )
    if algorithm.importance_method == "off" and not algorithm.loss_spec.weighs_sampler:
        raise ValueError(
            "algorithm.importance is off, but algorithm.replay.is_on is true and older policies sampled what is "
            "replayed; expected truncate or mask"
        )
    if algorithm.kl_coef:
        raise ValueError(
            f"algorithm.kl_coef is {algorithm.kl_coef}, but algorithm.replay.is_on is true and the penalty is measured "
            "on tokens of the present policy alone; expected 0, or no replay"
        )
    if algorithm.has_critic or algorithm.has_teacher:
        raise ValueError(
            f"algorithm.replay.is_on is true, but algorithm.advantage={algorithm.advantage} judges each token of the "
            "present policy; expected an advantage that compares the rewards of a group, or no replay"
        )


def check_prompts_return(algorithm: AlgorithmConfig, num_prompts: int, num_steps: int) -> str:
    """A warning where most prompts return too late for `max_age`, else "".

    Args:
        algorithm: with replay, without a curriculum, derived values filled in.
        num_prompts: of training.
        num_steps: of the run.

    Raises:
        ValueError: no prompt is drawn a second time.
    """
    per_step = (algorithm.prompts_per_step or 1) * (1 + algorithm.max_refills)
    if num_steps * per_step <= num_prompts:
        raise ValueError(
            f"algorithm.replay.is_on is true, but {num_steps} steps (training.num_steps) draw none of {num_prompts} "
            "prompts a second time; expected algorithm.curriculum.is_on=true, fewer prompts (data.limit) or more steps"
        )
    num_versions = num_prompts // per_step * algorithm.num_updates
    if num_versions <= algorithm.replay.max_age:
        return ""
    return (
        f"a prompt returns after {num_versions} updates on average, but algorithm.replay.max_age is "
        f"{algorithm.replay.max_age}: few successes will be replayed"
    )
