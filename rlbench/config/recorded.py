"""The config of a run that was recorded, with a call's overrides on top."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rlbench.config.compose import config_folder, group_choices, to_run_config
from rlbench.config.schema import RunConfig
from rlbench.config.unread import VLLM_ONLY

_MAX_NAMED = 8  # runs


def recorded_config(run_folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """What `config.yaml` of the run says, derived values included, changed as the overrides say.

    Args:
        run_folder: of the run.
        overrides: `key=value`; `group=choice`, which replaces the whole group; `~key`, which removes one entry.

    Raises:
        ValueError: no run is there, or an override cannot be applied.
    """
    saved = run_folder / "config.yaml"
    if not saved.is_file():
        raise ValueError(_no_run(run_folder))
    config = _saved(saved)
    apply_overrides(config, overrides)
    return to_run_config(config)


def apply_overrides(config: Any, overrides: Sequence[str]) -> None:
    """`apply_override` of each; with another engine.kind, what was derived for vLLM alone is left open again.

    Raises:
        ValueError: as `apply_override`.
        OmegaConfBaseException: as `apply_override`.
    """
    kind = config.engine.kind
    for override in overrides:
        apply_override(config, override)
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    if kind == "vllm" != config.engine.kind:
        for name, default in VLLM_ONLY.items():
            if f"engine.{name}" not in given:
                config.engine[name] = default


def _no_run(folder: Path) -> str:
    """What is wrong with a folder that holds no config.yaml, and where runs lie if some are right below it."""
    if folder.is_file():
        return f"{folder} is a file; expected the folder of a run, which holds config.yaml"
    if not folder.is_dir():
        return f"there is no folder {folder}; expected the folder of a run, e.g. outputs/grpo_gsm8k/..."
    below = sorted(file.parent for file in folder.glob("*/config.yaml"))
    if not below:
        return f"{folder} holds no config.yaml; expected the folder of a run, e.g. outputs/grpo_gsm8k/..."
    more = ", ..." if len(below) > _MAX_NAMED else ""
    return f"{folder} holds runs and is none; expected one of: {', '.join(map(str, below[:_MAX_NAMED]))}{more}"


def _saved(file: Path) -> Any:
    """
    Raises:
        ValueError: it cannot be read, or a key is unknown here.
    """
    try:
        saved = OmegaConf.load(file)
        if not isinstance(saved, DictConfig) or not saved:
            raise ValueError(f"{file} holds no settings; expected those of a run, as key: value")
        return OmegaConf.merge(OmegaConf.structured(RunConfig), saved)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read ({reason}); expected the settings of a run") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{file} does not fit this version of rlbench ({reason}); expected the version that wrote it, which "
            "environment.json beside it names"
        ) from error


def apply_override(config: Any, override: str) -> None:
    """Change a composed config in place, as `recorded_config` describes.

    Raises:
        ValueError: the override cannot be read or applied.
        OmegaConfBaseException: there is no such key, or it cannot hold the value.
    """
    if override.startswith("~"):
        parent, _, name = override[1:].rpartition(".")
        node = OmegaConf.select(config, parent) if parent else None
        if node is None or name not in node:
            raise ValueError(f"{override}: the run has no {override[1:]}, so it cannot be removed")
        del node[name]
        return
    key, equals, value = override.lstrip("+").partition("=")
    if not equals or not key:
        raise ValueError(f"cannot read the override {override!r}: expected key=value, group=choice or ~key")
    choices = [] if "." in key else group_choices(key)
    if not choices:
        entry: Any = OmegaConf.from_dotlist([f"{key}={value}"])
        config.merge_with(entry)
        return
    if value not in choices:
        raise ValueError(f"{key}={value}: there is no such choice, expected one of: {', '.join(choices)}")
    config[key] = OmegaConf.structured(type(OmegaConf.to_object(config[key])))
    config[key].merge_with(OmegaConf.load(config_folder() / key / f"{value}.yaml"))
