"""What a run holds on the device beside base and policy: critic, reference, teacher, reward models; by arithmetic.

Adapters are counted as in `rlbench.models.trained_memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlbench.config.full_training import FULL, needs_frozen_copy
from rlbench.config.schema import RunConfig
from rlbench.config.trained_reward import find_trained_rewards, is_trained
from rlbench.models.layer_shape import GIB, LayerShape, base_bytes, item_bytes
from rlbench.models.names import PATCHED_FAMILIES
from rlbench.models.source import model_place, read_text_config
from rlbench.models.trained_memory import frozen_adapter_bytes, paged_bytes, trained_adapter_bytes
from rlbench.models.warm_start import frozen_adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldModel:
    """An adapter, or a model, that is there in generation and in training.

    Example:
        HeldModel(name="the critic", num_bytes=18 * 41_943_040)
    """

    name: str
    num_bytes: int = 0
    uncounted: str = ""  # why num_bytes does not say it
    shape: LayerShape | None = None  # of a model that has a base of its own

    @property
    def words(self) -> str:
        return f"{self.name} ({self.uncounted or f'{self.num_bytes / GIB:.1f} GiB'})"


def held_models(config: RunConfig, text_config: Any) -> list[HeldModel]:
    """Beside base and policy, in the order in which a run makes them.

    Args:
        config: derived.
        text_config: of the base, from transformers.
    """
    shape = LayerShape.from_config(text_config)
    found = []
    reason = needs_frozen_copy(config)
    if reason:
        copy = base_bytes(shape, text_config, item_bytes(config), quantization="none")
        found.append(HeldModel(name=f"a frozen copy for {reason}", num_bytes=copy))
    paged = paged_bytes(config, shape, text_config)
    if paged:
        found.append(HeldModel(name="paged moments", uncounted=f"{paged / GIB:.1f} GiB, not counted"))
    if config.stage != "rl":
        return found
    if config.algorithm.has_critic:
        found.append(HeldModel(name="the critic", num_bytes=trained_adapter_bytes(config, shape)))
    found += _rewards(config, shape)
    found += _teacher(config, shape)
    if has_reference(config):
        size = frozen_adapter_bytes(config, shape, config.lora.rank)
        found.append(HeldModel(name="the reference's adapter", num_bytes=size))
    return found


def has_reference(config: RunConfig) -> bool:
    """Whether an online run has a reference policy that is not its base: an adapter of its own.

    Args:
        config: derived.
    """
    is_start = config.algorithm.pairs.is_on and config.preference.reference == "start"
    return (config.algorithm.reference_refresh_steps > 0 or is_start) and config.training.parameters != FULL


def has_reward_model(config: RunConfig) -> bool:
    """Whether completions are scored on the device while the engine holds its keys and values."""
    return config.stage == "rl" and any(is_trained(component) for component in config.rewards.components.values())


def beside_words(held: Sequence[HeldModel]) -> str:
    """Behind "the base": what else is there."""
    return "".join(f", {model.words}" for model in held)


def _rewards(config: RunConfig, shape: LayerShape) -> list[HeldModel]:
    if not has_reward_model(config):
        return []
    try:
        trained = find_trained_rewards(config)
    except ValueError:  # `build.prepare` says what is wrong; of a chain, an earlier stage may still write it
        return [HeldModel(name="the reward model", uncounted="not there yet, not counted")]
    sizes = {name: frozen_adapter_bytes(config, shape, reward.lora.rank) for name, reward in trained.items()}
    return [HeldModel(name=f"reward model {name}", num_bytes=size) for name, size in sizes.items()]


def _teacher(config: RunConfig, shape: LayerShape) -> list[HeldModel]:
    teacher, name = config.algorithm.teacher, "the teacher"
    if not config.algorithm.has_teacher or (teacher.model is None and teacher.adapter is None):
        return []
    own_shape, base = None, 0
    if teacher.model is not None:
        model = replace(config.model, path=teacher.model)
        place = model_place(model)
        text_config = read_text_config(place) if place else None
        if text_config is None:
            return [HeldModel(name=name, uncounted="its config.json cannot be had, not counted")]
        if text_config.model_type not in PATCHED_FAMILIES:
            return [HeldModel(name=name, uncounted=f"a {text_config.model_type} model, not counted")]
        shape = own_shape = LayerShape.from_config(text_config)
        base = base_bytes(shape, text_config, item_bytes(config), quantization=model.quantization)
    rank = 1  # of an adapter that changes nothing
    if teacher.adapter is not None:
        try:
            rank = frozen_adapter(teacher.adapter, "algorithm.teacher.adapter").rank
        except ValueError:  # as for reward models
            return [HeldModel(name=name, num_bytes=base, uncounted="its adapter is not there yet, not counted")]
    adapter = frozen_adapter_bytes(config, shape, rank)
    return [HeldModel(name=name, num_bytes=base + adapter, shape=own_shape)]
