"""What a resumed run keeps of its settings, and which it may change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rlbench.config.renamed import name_of_today
from rlbench.config.schema import AUTO, RunConfig
from rlbench.config.unread import VLLM_ONLY

_FREE = ("resume", "tracking.", "checkpoint.", "evaluation.", "hardware.", "checks.", "watchdog.",
         "rewards.num_workers", "model.cache_dir", "training.stop_grace_s")  # fmt: skip
_WARN = (
    "training.",
    "optim.",
    "engine.",
    "rewards.",
    "algorithm.",
    "sampling.",
    "sft.",
    "preference.",
    "reward_model.",
    "name",
)

_FIXED = ("training.parameters", "lora.dropout", "optim.name", "optim.galore.rank")  # whatever _WARN says

_OF_THIS_MACHINE = ("hardware.", "rewards.num_workers")


def keep_derived(config: RunConfig, derived: dict[str, Any]) -> list[str]:
    """Fill what is left open with what the run derived when it began: a busier machine must not change its course.

    Args:
        config: of this call, changed in place; what the user set stays.
        derived: derived.json of the run.

    Returns:
        "key=value" for each value that was taken over.
    """
    kept = []
    unread = () if config.engine.kind in (AUTO, "vllm") else tuple(f"engine.{name}" for name in VLLM_ONLY)
    for recorded, entry in derived.items():
        key, value = name_of_today(recorded, entry["value"])
        section, name = key.split(".")
        part = getattr(config, section, None)
        if not key.startswith((*_OF_THIS_MACHINE, *unread)) and getattr(part, name, "") in (None, AUTO):
            setattr(part, name, value)
            kept.append(f"{key}={value}")
    return kept


def check_resumable(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """One line for each setting that changes the run's course from here on.

    Args:
        saved: the settings of the run, from `trained_settings`.
        current: the config of this call, derived values filled in.

    Raises:
        ValueError: a setting differs that the checkpoint depends on (model, adapter, data, seed).
    """
    before, now, defaults = (dict(_leaves(tree)) for tree in (saved, current, asdict(RunConfig())))
    warnings = []
    for key in sorted(before.keys() | now.keys()):
        old = before.get(key, defaults.get(key))  # a run from before the key had what is its default now
        if old == now.get(key) or key.startswith(_FREE):
            continue
        change = f"{key} was {old!r} in the run that is resumed and is {now.get(key)!r} now"
        if key in _FIXED or not key.startswith(_WARN):
            raise ValueError(f"{change}; expected the same value, or a new run")
        warnings.append(f"{change}: the run will not be what it would have been without the stop")
    return warnings


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, node
