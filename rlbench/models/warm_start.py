"""An adapter of an earlier run as the start of this one: found and checked before any weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlbench.config.schema import LoraConfig

_KEYS = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora"}  # adapter_config.json -> LoraConfig


def find_adapter(config: LoraConfig) -> Path | None:
    """The PEFT folder that `lora.init_from` names: itself, or `adapter/` inside a run's folder or a checkpoint.

    Args:
        config: the `lora` part of the config.

    Returns:
        The folder; None if the adapter starts from random weights.

    Raises:
        ValueError: there is no adapter, or it was made with other `lora.*` settings.
    """
    if config.init_from is None:
        return None
    folder, saved = _read(config.init_from, "lora.init_from")
    for theirs, ours in _KEYS.items():
        if saved.get(theirs) != getattr(config, ours):
            raise ValueError(
                f"lora.{ours} is {getattr(config, ours)}, but the adapter of lora.init_from={config.init_from} was "
                f"made with {saved.get(theirs)}; expected the same"
            )
    return folder


def frozen_adapter(place: str, key: str) -> LoraConfig:
    """The settings of an adapter that is only read, with `init_from` its folder.

    Args:
        place: the folder of a finished run or of a PEFT adapter.
        key: that names it, for errors.

    Raises:
        ValueError: there is no adapter.
    """
    folder, saved = _read(place, key)
    targets = saved["target_modules"]
    return LoraConfig(
        targets=targets if isinstance(targets, str) else ",".join(sorted(targets)),
        init_from=str(folder),
        **{ours: saved[theirs] for theirs, ours in _KEYS.items()},
    )


def _read(place: str, key: str) -> tuple[Path, dict[str, Any]]:
    """The adapter's folder and its adapter_config.json."""
    given = Path(place).expanduser()
    folder = next((f for f in (given, given / "adapter") if (f / "adapter_model.safetensors").is_file()), None)
    if folder is None:
        newest = max(given.glob("checkpoints/step-*/adapter"), default=None)
        hint = f"; the run was stopped, its newest checkpoint is {key}={newest}" if newest else ""
        if (given / "model" / "config.json").is_file():
            hint = f"; that run trained all weights: model.path={given / 'model'}"
        raise ValueError(
            f"{key} is {place}, but no adapter_model.safetensors is there or in its adapter/; "
            f"expected the folder of a finished run or of a PEFT adapter{hint}"
        )
    try:
        return folder, json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {folder}/adapter_config.json cannot be read ({error})") from error
