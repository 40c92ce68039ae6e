"""The settings of an evaluation: a run's, without what only training reads, and those of this call on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.compose import to_run_config
from rlbench.config.optim import OptimConfig
from rlbench.config.preference import PreferenceConfig
from rlbench.config.recorded import apply_overrides
from rlbench.config.schema import CheckpointConfig, EngineConfig, RunConfig

_NOT_READ = (
    "stage", "resume", "algorithm", "optim", "sft", "preference", "reward_model", "checkpoint", "watchdog", "chain",
)  # fmt: skip
_OF_TRAINING = ("init_from", "dropout")  # of `lora`
_OF_BOTH = ("data", "evaluation", "sampling", "rewards", "seed")  # what is asked, and how; the rest is a policy's own
_OF_A_POLICY = ("model", "engine", "hardware", "checks", "training")


def run_settings(run_folder: Path, trained: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Those to evaluate a run's policy with.

    Args:
        run_folder: for messages.
        trained: from `policy_config`.
        overrides: of this call.

    Raises:
        ValueError: an override is wrong, is of no use here, or would put the weights on another base.
    """
    _check_read(overrides)
    config = _with(_plain(trained), overrides)
    _check_same_weights(run_folder, trained, config)
    if not config.rewards.components:
        raise ValueError(
            f"{run_folder} is a run of stage={trained.stage}, which has no rewards to score answers with; expected "
            "rewards=CHOICE, e.g. rewards=math"
        )
    _check_evaluates(config)
    return config


def untrained_settings(config: RunConfig) -> RunConfig:
    """Those to evaluate the policy that a run would start with.

    Raises:
        ValueError: the config's stage samples nothing, or no prompts are asked for.
    """
    if config.stage != "rl":
        raise ValueError(f"stage is {config.stage}, but eval samples a policy; expected an experiment of stage=rl")
    if config.resume is not None:
        raise ValueError(f"resume is {config.resume}, but eval goes on with nothing; expected its folder: eval RUN")
    found = replace(
        config,
        algorithm=AlgorithmConfig(),
        optim=OptimConfig(),
        preference=PreferenceConfig(),
        checkpoint=CheckpointConfig(),
        evaluation=replace(config.evaluation, every_steps=0),
    )
    _check_evaluates(found)
    return found


def settings_like(config: RunConfig, run_folder: Path, trained: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Those to evaluate another run's policy with, on the same prompts in the same way.

    Args:
        config: of the first policy, derived.
        run_folder: of the other run, for messages.
        trained: from `policy_config`, of the other run.
        overrides: of this call; those of the model, engine and device hold for both policies.

    Raises:
        ValueError: as `run_settings`.
    """
    shared = {key: value for key, value in asdict(config).items() if key in _OF_BOTH}
    own = [override for override in overrides if _key(override).partition(".")[0] in _OF_A_POLICY]
    found = _with(_plain(trained) | shared, own)
    _check_same_weights(run_folder, trained, found)
    return found


def _check_read(overrides: Sequence[str]) -> None:
    """
    Raises:
        ValueError: one would be silently without effect.
    """
    for override in overrides:
        section = _key(override).partition(".")[0]
        if section in _NOT_READ:
            raise ValueError(
                f"{override} changes nothing of an evaluation; expected settings of data, evaluation, sampling, "
                "rewards, engine, model, hardware, checks, tracking, or seed"
            )


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _plain(trained: RunConfig) -> dict[str, Any]:
    """A run's settings as those of stage=rl. Its weights are those of a checkpoint, so nothing starts elsewhere."""
    plain = {key: value for key, value in asdict(trained).items() if key not in _NOT_READ}
    plain["lora"] |= {"init_from": None, "dropout": 0.0}
    plain["evaluation"]["every_steps"] = 0
    if trained.engine.kind == "recorded":
        plain["engine"] = asdict(EngineConfig())
    return plain


def _with(plain: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    node: Any = OmegaConf.merge(OmegaConf.structured(RunConfig), plain)
    apply_overrides(node, overrides)
    return to_run_config(node)


def _check_same_weights(run_folder: Path, trained: RunConfig, config: RunConfig) -> None:
    """
    Raises:
        ValueError: base or adapter would be another than the one that was trained.
    """
    pairs = {
        f"lora.{f.name}": (getattr(trained.lora, f.name), getattr(config.lora, f.name)) for f in fields(config.lora)
    }
    pairs = {key: pair for key, pair in pairs.items() if key not in ("lora.init_from", "lora.dropout")}
    pairs["model.path"] = (trained.model.path, config.model.path)
    pairs["training.parameters"] = (trained.training.parameters, config.training.parameters)
    for key, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ValueError(
                f"{key} is {ours}, but the weights of {run_folder} were trained with {theirs}; expected no {key}"
            )
    for name in _OF_TRAINING:
        if getattr(config.lora, name):
            raise ValueError(
                f"lora.{name} is {getattr(config.lora, name)}, but the weights are those of a checkpoint of "
                f"{run_folder}, as they are; expected no lora.{name}"
            )


def _check_evaluates(config: RunConfig) -> None:
    if config.evaluation.num_prompts == 0:
        raise ValueError(
            "evaluation.num_prompts is 0, so there is nothing to evaluate; expected the number of held-out prompts, "
            "e.g. evaluation.num_prompts=500"
        )
    if config.engine.kind == "recorded":
        raise ValueError("engine.kind is recorded, which generates nothing; expected engine=auto, hf or vllm")
