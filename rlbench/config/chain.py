"""The stages of a chain as configs of runs: the shared settings, each stage's overrides on top."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from omegaconf import OmegaConf

from rlbench.config.compose import CONFIG_ERRORS, explain_config_error, to_run_config
from rlbench.config.full_training import check_chain
from rlbench.config.recorded import apply_override
from rlbench.config.schema import STAGES, ChainStageConfig, RunConfig

_SET_BY_THE_CHAIN = ("name", "resume", "chain", "exp", "lora.init_from")
_SAME_IN_ALL = ("model.path", "lora.rank", "lora.alpha", "lora.targets", "lora.rslora")  # else the adapter does not fit


def stage_configs(config: RunConfig, command_line: Sequence[str] = ()) -> list[RunConfig]:
    """One config a stage, in order; `lora.init_from` and `resume` of the later ones are left to the run.

    A stage starts with the defaults of the shared sections that it does not read but another stage does.

    Args:
        config: with a `chain`; not changed.
        command_line: the overrides of this call; one that a stage's own override would undo is an error.

    Raises:
        ValueError: a stage's settings are wrong; the stage and the key are named.
    """
    _check_names(config.chain)
    kinds = [_kind(stage, config.stage) for stage in config.chain]
    configs = []
    for index, (stage, kind) in enumerate(zip(config.chain, kinds, strict=True)):
        try:
            _check_overrides(stage, command_line, index)
            left_out = unread_sections(kind, kinds)
            configs.append(_with_overrides(config, stage.overrides, left_out, is_first=index == 0))
            _check_same(configs[0], configs[-1], config.chain[0].name)
            check_chain(configs[-1])
        except ValueError as error:
            raise ValueError(f"{stage_name(config.chain, index)}: {error}") from error
    return configs


def unread_sections(kind: str, kinds: Sequence[str]) -> list[str]:
    """Sections that a stage of this kind does not read but another one of the chain does.

    Args:
        kind: `stage` of the stage.
        kinds: of all stages.
    """
    return [section for section in STAGES.get(kind, ()) if any(section not in STAGES.get(k, ()) for k in kinds)]


def stage_name(chain: Sequence[ChainStageConfig], index: int) -> str:
    """How messages call a stage."""
    return f"stage {chain[index].name!r} (chain.{index})"


def _with_overrides(
    config: RunConfig, overrides: Sequence[str], left_out: Sequence[str], *, is_first: bool
) -> RunConfig:
    plain = {key: value for key, value in asdict(config).items() if key not in (*left_out, "chain", "resume")}
    if not is_first:
        plain["lora"]["init_from"] = None
    try:
        node: Any = OmegaConf.merge(OmegaConf.structured(RunConfig), plain)
        for override in overrides:
            apply_override(node, override)
        return to_run_config(node)
    except CONFIG_ERRORS as error:
        raise ValueError(explain_config_error(error, overrides)) from error


def _kind(stage: ChainStageConfig, shared: str) -> str:
    given = [override.partition("=")[2] for override in stage.overrides if override.startswith("stage=")]
    return given[-1] if given else shared


def _check_names(chain: Sequence[ChainStageConfig]) -> None:
    names = [stage.name for stage in chain]
    for index, name in enumerate(names):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"chain.{index}.name is {name!r}, expected letters, digits, _ and -: it names a folder")
        if name in names[:index]:
            raise ValueError(f"chain.{index}.name is {name!r}, as chain.{names.index(name)}.name; expected another")


def _check_overrides(stage: ChainStageConfig, command_line: Sequence[str], index: int) -> None:
    keys = [_key(override) for override in stage.overrides]
    for key in keys:
        if key in _SET_BY_THE_CHAIN:
            raise ValueError(f"{key} is set in overrides, but the chain sets it; expected it in none of the stages")
    command_line_keys = [_key(override) for override in command_line]
    if f"chain.{index}.overrides" in command_line_keys:
        return  # the user wrote both
    for given in command_line_keys:
        undone = next((key for key in keys if given == key or given.startswith(f"{key}.")), None)
        if undone is not None:
            raise ValueError(
                f"{given} is set on the command line, but the stage's override of {undone} undoes it; expected one of "
                f"""them: 'chain.{index}.overrides=["key=value",...]' replaces the stage's list"""
            )


def _check_same(first: RunConfig, current: RunConfig, first_name: str) -> None:
    for key in _SAME_IN_ALL:
        section, name = key.split(".")
        before, now = getattr(getattr(first, section), name), getattr(getattr(current, section), name)
        if before != now:
            raise ValueError(f"{key} is {now}, but stage {first_name!r} has {before}; expected the same in all stages")


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
