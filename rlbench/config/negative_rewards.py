"""Rewards below 0, and advantages that are not defined for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlbench.config.checks import RefusedSetting

if TYPE_CHECKING:
    from rlbench.config.schema import RunConfig


def check_no_reward_is_negative(config: RunConfig) -> None:
    """Of what the settings alone say; a component's own value is known when it is there.

    Raises:
        RefusedSetting: a setting takes rewards below 0, and the advantage is not defined there.
    """
    if config.algorithm.refuses_negative_rewards and not config.chain:
        for key, value, expected in _lowering(config):
            raise RefusedSetting(
                f"{key} is {value}, which takes rewards below 0, where algorithm.advantage="
                f"{config.algorithm.advantage} is not defined; expected {expected}, or another advantage",
                "algorithm.advantage",  # not the key: rewards that are scored again are those of the run
                type(config.algorithm).advantage,
                is_read=True,
            )


def _lowering(config: RunConfig) -> Iterator[tuple[str, object, str]]:
    """Key, value, and what would not lower rewards."""
    algorithm, rewards = config.algorithm, config.rewards
    if algorithm.has_kl_reward:
        yield "algorithm.kl_in", algorithm.kl_in, "loss"
    if algorithm.overlong_buffer_tokens:
        yield "algorithm.overlong_buffer_tokens", algorithm.overlong_buffer_tokens, "0"
    if rewards.combine == "normalised_sum":
        yield "rewards.combine", rewards.combine, "sum or product"
    if rewards.gated_value < 0 and any(c.gate_min is not None for c in rewards.components.values()):
        yield "rewards.gated_value", rewards.gated_value, "at least 0"
