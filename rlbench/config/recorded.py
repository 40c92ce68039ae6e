"""The config of a run that was recorded, with a call's overrides on top.

The run may be of an older version: what new runs are refused for is no reason to refuse one that was trained, and what
has another name now is read as what it meant. The overrides are new, and held to all that new runs are held to.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rlbench.config.checks import RefusedSetting, nearest
from rlbench.config.compose import config_folder, group_choices, is_open, leaves, schema_keys, to_run_config
from rlbench.config.renamed import as_written, rename_settings
from rlbench.config.schema import AUTO, RunConfig
from rlbench.config.unread import VLLM_ONLY, check_engine_settings, check_profile_is_made

_MAX_NAMED = 8  # runs


def recorded_config(run_folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """What `config.yaml` of the run says, derived values included, changed as the overrides say.

    What is read as something else than it says is printed, once.

    Args:
        run_folder: of the run.
        overrides: `key=value`; `group=choice`, which replaces the whole group; `~key`, which removes one entry.

    Raises:
        ValueError: no run is there, it has a setting that is not known here, or an override cannot be applied.
    """
    config, _ = _saved(_file_of(run_folder))
    apply_overrides(config, overrides)
    return to_run_config(config)


def trained_settings(run_folder: Path) -> dict[str, Any]:
    """What the run was trained with so far, nested: `recorded_config`, but with what a new run could not have.

    Raises:
        ValueError: as `recorded_config`.
    """
    config, trained_with = _saved(_file_of(run_folder))
    settings = asdict(to_run_config(config))
    for key, value in trained_with.items():
        *sections, name = key.split(".")
        part = settings
        for section in sections:
            part = part[section]
        part[name] = value
    return settings


def _file_of(run_folder: Path) -> Path:
    saved = run_folder / "config.yaml"
    if not saved.is_file():
        raise ValueError(_no_run(run_folder))
    return saved


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


def _saved(file: Path) -> tuple[Any, dict[str, Any]]:
    """The settings as a run could have them that starts now, and those of them that it was trained with instead.

    Raises:
        ValueError: it cannot be read, a key is unknown here, or no run could be had with these settings.
    """
    try:
        saved = OmegaConf.load(file)
        if not isinstance(saved, DictConfig) or not saved:
            raise ValueError(f"{file} holds no settings; expected those of a run, as key: value")
        config = OmegaConf.merge(OmegaConf.structured(RunConfig), _known_here(file, saved))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read ({reason}); expected the settings of a run") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{file} does not fit this version of rlbench ({reason}); expected the version that wrote it, which "
            "environment.json beside it names"
        ) from error
    return config, _accept(file, config)


def _known_here(file: Path, saved: DictConfig) -> dict[str, Any]:
    """The settings of the file, by the names of today.

    Raises:
        ValueError: a key is unknown here.
    """
    then: Any = OmegaConf.to_container(saved)
    settings, changes = rename_settings(then)
    known = set(schema_keys())
    for key, value in leaves(settings):
        if key not in known and not is_open(key):
            raise ValueError(
                f"{file} has {key}={as_written(value)}, which this version of rlbench does not know (nearest valid "
                f"keys: {', '.join(nearest(key, known)) or 'none'}); expected the version that wrote it, which "
                "environment.json beside it names, or the file without that line if nothing here needs it"
            )
    for change in changes:
        _say_once(f"{file}: {change}")
    return settings


def _accept(file: Path, config: Any) -> dict[str, Any]:
    """Put what a new run would be refused for to what a run has without it, in place, until nothing is refused.

    Returns:
        What was put to another value although training depends on it, by key.

    Raises:
        ValueError: no run could be had with these settings.
    """
    accepted, trained_with = set(), {}
    while True:
        try:
            _check_as_new(config)
            return trained_with
        except RefusedSetting as refused:
            if refused.key in accepted:
                raise ValueError(f"{file}: {refused}") from refused
            accepted.add(refused.key)
            was = _plain(OmegaConf.select(config, refused.key))
            if refused.is_read:
                trained_with[refused.key] = was
            OmegaConf.update(config, refused.key, refused.instead, merge=False)
            why = "no run can have it any more" if refused.is_read else "nothing reads it"
            _say_once(f"{file}: {refused.key}={as_written(was)} is read as {as_written(refused.instead)}: {why}")
        except ValueError as error:
            raise ValueError(f"{file}: {' '.join(str(error).split())}") from error


def _check_as_new(config: Any) -> None:
    """
    Raises:
        ValueError: a run that starts now would be refused.
    """
    found = to_run_config(config)
    check_profile_is_made(found)
    if found.engine.kind != AUTO:
        check_engine_settings(found.engine)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


@cache
def _say_once(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


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
