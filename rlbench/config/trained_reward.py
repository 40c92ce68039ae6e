"""A trained reward model as a reward: what its component says, checked against the run that it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlbench.config.checks import check_choice
from rlbench.config.schema import LoraConfig, RewardConfig, RewardsConfig, RunConfig

REWARD_MODEL = "reward_model"  # `path` of such a component: it is scored in this process, with the run's own base
NORMALISE = ["none", "held_out"]
_KWARGS = ("run", "normalise")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedReward:
    """Where a reward model lies, and how its scores are used."""

    folder: Path  # adapter and head
    lora: LoraConfig  # of its run
    normalise: str  # none | held_out: less the mean, over the deviation of the scores of its held-out pairs


def is_trained(component: RewardConfig) -> bool:
    return component.path == REWARD_MODEL


def find_trained_rewards(config: RunConfig) -> dict[str, TrainedReward]:
    """The reward models among the rewards, by name of their component.

    Args:
        config: of the run that uses them, model.path derived.

    Raises:
        ValueError: one is not there, or was trained on another base.
    """
    components = config.rewards.components.items()
    return {name: _find(f"rewards.components.{name}", c, config) for name, c in components if is_trained(c)}


def check_without_model(config: RewardsConfig, command: str) -> None:
    """
    Raises:
        ValueError: a reward model is among the rewards, and the command loads no base.
    """
    for name, component in config.components.items():
        if is_trained(component):
            raise ValueError(
                f"rewards.components.{name} is a reward model, but {command} loads no model to score with; expected "
                f"it left out (~rewards.components.{name})"
            )


def _find(key: str, component: RewardConfig, config: RunConfig) -> TrainedReward:
    place, normalise = _kwargs(key, component)
    folder = next((f for f in (place / "adapter", place) if (f / "value_head.safetensors").is_file()), None)
    saved = next((f / "config.yaml" for f in (place, *place.parents) if (f / "config.yaml").is_file()), None)
    if folder is None or saved is None:
        raise ValueError(
            f"{key}.kwargs.run is {place}, but no value_head.safetensors of a run is there; expected the folder of a "
            "finished run of stage=reward_model, or one of its checkpoints"
        )
    its = yaml.safe_load(saved.read_text())
    if its["stage"] != "reward_model":
        raise ValueError(f"{key}.kwargs.run is {place}, a run of stage={its['stage']}; expected one of reward_model")
    for name in ("path", "quantization"):
        theirs, ours = its["model"][name], getattr(config.model, name)
        if not _is_same(theirs, ours):
            raise ValueError(
                f"model.{name} is {ours}, but the reward model of {key}.kwargs.run was trained with {theirs}; expected "
                "the same base"
            )
    lora = LoraConfig(**{**its["lora"], "init_from": str(folder)})
    return TrainedReward(folder=folder, lora=lora, normalise=normalise)


def _kwargs(key: str, component: RewardConfig) -> tuple[Path, str]:
    for name in component.kwargs:
        if name not in _KWARGS:
            raise ValueError(f"there is no key '{key}.kwargs.{name}'; a reward model has {', '.join(_KWARGS)}")
    for name in ("batch_size", "timeout_s", "as_messages"):
        value = getattr(component, name)
        if value != getattr(RewardConfig, name):
            raise ValueError(
                f"{key}.{name} is {value}, but a reward model is scored in this process, packed as "
                "training.tokens_per_microbatch says; expected its default"
            )
    run: Any = component.kwargs.get("run")
    if not isinstance(run, str) or not run:
        raise ValueError(f"{key}.kwargs.run is {run!r}, expected the folder of a run of stage=reward_model")
    normalise = component.kwargs.get("normalise", "held_out")
    check_choice(f"{key}.kwargs.normalise", normalise, NORMALISE)
    return Path(run).expanduser(), normalise


def _is_same(theirs: str | None, ours: str | None) -> bool:
    if theirs == ours or theirs is None or ours is None:
        return theirs == ours
    return Path(theirs).exists() and Path(theirs).resolve() == Path(ours).resolve()
