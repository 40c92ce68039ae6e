"""Training of all weights (training.parameters=full): what it cannot be combined with, and what needs a frozen copy."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlbench.config.schema import RunConfig

LORA, FULL = "lora", "full"
PARAMETERS = [LORA, FULL]
_HIGH = 10.0  # times the usual learning rate
_ADAPTER_LR = 1e-4
_FULL_LR = {"rl": (1e-6, "GRPOConfig"), "sft": (2e-5, "SFTConfig"), "preference": (1e-6, "DPOConfig")}


def check_full_training(config: RunConfig) -> None:
    """
    Raises:
        ValueError: training.parameters=full, with a setting that needs an adapter on a frozen base.
    """
    if config.training.parameters != FULL:
        return
    for name in (f.name for f in fields(config.lora)):
        value, default = getattr(config.lora, name), getattr(type(config.lora)(), name)
        if value != default:
            hint = "model.path=RUN/model to start from a run of all weights" if name == "init_from" else "its default"
            _refuse(f"lora.{name} is {value}", "no adapter is trained", hint)
    quantization = config.model.quantization
    if quantization != "none":
        _refuse(f"model.quantization is {quantization}", "quantised weights cannot be trained", "none")
    if config.stage == "reward_model":
        _refuse("stage is reward_model", "a reward model is an adapter and a head on a base that others share", "lora")
    if config.chain:
        check_chain(config)
    if config.training.recompute == "mlp":
        _refuse("training.recompute is mlp", "that needs the kernels of a frozen base", "auto, none or full")
    algorithm = config.algorithm
    if algorithm.has_critic:
        _refuse(f"algorithm.advantage is {algorithm.advantage}", "its critic is an adapter on a frozen base", "another")
    if algorithm.reference_refresh_steps:
        _refuse(
            f"algorithm.reference_refresh_steps is {algorithm.reference_refresh_steps}",
            "a reference that follows is an adapter on a frozen base",
            "0",
        )


def default_lr(config: RunConfig) -> tuple[float, str]:
    """optim.lr where the user set none, and why.

    Source: `learning_rate` in trl/trainer/grpo_config.py, sft_config.py and dpo_config.py of
    https://github.com/huggingface/trl at 006d32c9, 016013e8 and 3da24240.
    """
    if config.training.parameters != FULL:
        return _ADAPTER_LR, "of an adapter, in every stage"
    lr, name = _FULL_LR[config.stage]
    return lr, f"training.parameters is full: the default of TRL's {name}, which trains all weights too"


def high_lr_note(config: RunConfig) -> str:
    """What to say of an optim.lr that is set, in an experiment's file perhaps for an adapter; empty if it is usual.

    Args:
        config: derived.
    """
    if config.training.parameters != FULL:
        return ""
    usual, reason = default_lr(config)
    chosen = config.optim.lr or usual
    if chosen < _HIGH * usual:
        return ""
    return f"{chosen / usual:.0f} times {usual:g}, which optim.lr=null would take ({reason})"


def check_chain(config: RunConfig) -> None:
    """Of a chain, or of one of its stages.

    Raises:
        ValueError: training.parameters=full.
    """
    if config.training.parameters == FULL:
        expected = "runs one after the other, each with model.path=RUN/model of the last"
        _refuse("chain has stages", "a chain hands on adapters", expected)


def needs_frozen_copy(config: RunConfig) -> str:
    """The setting for which a run of all weights holds a second, frozen copy of the model; empty if there is none.

    Args:
        config: derived.
    """
    algorithm, preference = config.algorithm, config.preference
    if config.training.parameters != FULL:
        return ""
    if config.stage == "preference":
        return "preference.reference=base" if preference.needs_reference and preference.reference == "base" else ""
    if config.stage != "rl":
        return ""
    if algorithm.has_kl_loss or algorithm.has_kl_reward:
        return "algorithm.kl_coef"
    if algorithm.pairs.is_on and preference.needs_reference:
        return "preference.losses"
    if algorithm.has_teacher and algorithm.teacher.model is None:
        return "algorithm.teacher"
    trained = [name for name, reward in config.rewards.components.items() if reward.path == "reward_model"]
    return f"rewards.components.{trained[0]}" if trained else ""


def _refuse(what: str, why: str, expected: str) -> None:
    raise ValueError(
        f"{what}, but training.parameters is full: {why}; expected {expected}, or training.parameters=lora"
    )
