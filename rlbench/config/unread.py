"""Settings that another choice leaves unread: set all the same, they are an error, never ignored."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rlbench.config.checks import RefusedSetting

if TYPE_CHECKING:
    from rlbench.config.schema import EngineConfig, RunConfig

VLLM_ONLY: dict[str, str | None] = {"kv_cache_dtype": "auto", "kv_cache_gib": None, "dense_copies": None}  # defaults


def check_settings_are_read(config: RunConfig) -> None:
    """
    Raises:
        RefusedSetting: a setting is not its default, and another one says that nothing reads it.
    """
    for name in ("curriculum", "replay"):
        _check_is_on(f"algorithm.{name}", getattr(config.algorithm, name))
    if config.chain:  # each stage's own config is checked
        return
    if config.evaluation.num_samples and config.stage != "rl":
        raise RefusedSetting(
            f"evaluation.num_samples is {config.evaluation.num_samples}, but stage={config.stage} samples no answers; "
            "expected 0, or stage=rl",
            "evaluation.num_samples",
            0,
        )
    if config.engine.kind == "recorded" and config.checkpoint.keep_best:
        raise RefusedSetting(
            f"checkpoint.keep_best is {config.checkpoint.keep_best}, but engine=recorded answers no held-out problems; "
            "expected null, or another engine",
            "checkpoint.keep_best",
            None,
        )
    if config.algorithm.reads_components:
        _check_rewards_apart(config)
    _check_values(config)


def _check_values(config: RunConfig) -> None:
    algorithm, optim, rewards = config.algorithm, config.optim, config.rewards
    if config.stage == "rl" and algorithm.loss == "kl_cov" and algorithm.num_updates < 2:
        raise RefusedSetting(
            "algorithm.loss is kl_cov, whose penalty has no gradient in a batch's first update, but "
            f"algorithm.num_updates is {algorithm.num_updates}; expected at least 2, or another loss",
            "algorithm.num_updates",
            2,
            is_read=True,
        )
    lowest = type(optim).min_lr_frac
    if optim.schedule == "constant" and optim.min_lr_frac != lowest:
        raise RefusedSetting(
            f"optim.min_lr_frac is {optim.min_lr_frac}, but optim.schedule=constant never lowers the rate; expected "
            f"{lowest}, or optim.schedule=cosine or linear",
            "optim.min_lr_frac",
            lowest,
        )
    if rewards.gated_value and all(component.gate_min is None for component in rewards.components.values()):
        raise RefusedSetting(
            f"rewards.gated_value is {rewards.gated_value}, but no component has a gate_min; expected 0.0, or "
            "a gate: rewards.components.NAME.gate_min",
            "rewards.gated_value",
            0.0,
        )


def check_engine_settings(config: EngineConfig) -> None:
    """
    Args:
        config: `kind` derived; what else is derived for vLLM alone is not yet.

    Raises:
        RefusedSetting: a setting of vLLM's, and another engine.
    """
    if config.kind == "vllm":
        return
    for name, default in VLLM_ONLY.items():
        value = getattr(config, name)
        if value not in (default, "none"):
            raise RefusedSetting(
                f"engine.{name} is {value}, which engine={config.kind} does not have; expected engine=vllm or "
                f"engine.{name}={'null' if default is None else default}",
                f"engine.{name}",
                default,
            )


def check_profile_is_made(config: RunConfig) -> None:
    """
    Args:
        config: derived.

    Raises:
        RefusedSetting: a profile is asked for of a step that the run does not make.
    """
    profile_step, num_steps = config.tracking.profile_step or 0, config.training.num_steps or 0
    if profile_step > num_steps:
        raise RefusedSetting(
            f"tracking.profile_step is {profile_step}, expected at most training.num_steps ({num_steps}): no later "
            "update is made",
            "tracking.profile_step",
            None,
        )


def _check_is_on(key: str, part: Any) -> None:
    """
    Args:
        part: a dataclass with `is_on`.
    """
    if part.is_on:
        return
    for field in fields(part):
        value = getattr(part, field.name)
        if value != field.default:
            raise RefusedSetting(
                f"{key}.{field.name} is {value}, but {key}.is_on is false; expected {field.default}, or "
                f"{key}.is_on=true",
                f"{key}.{field.name}",
                field.default,
            )


def _check_rewards_apart(config: RunConfig) -> None:
    """Of an advantage that reads each reward apart: how they become one is not read."""
    rewards, advantage = config.rewards, config.algorithm.advantage
    why = f"but algorithm.advantage={advantage} reads each reward apart"
    if rewards.combine != "sum":
        message = f"rewards.combine is {rewards.combine}, {why}; expected sum, or another advantage"
        raise RefusedSetting(message, "rewards.combine", "sum")
    for name, component in rewards.components.items():
        if component.gate_min is not None:
            raise RefusedSetting(
                f"rewards.components.{name}.gate_min is {component.gate_min}, {why} and no gate closes; expected null, "
                "or another advantage",
                f"rewards.components.{name}.gate_min",
                None,
            )
