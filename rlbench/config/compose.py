"""The Hydra edge: where conf/ lies, which dataclass is the schema, and what a user reads when composing fails."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import rlbench
from rlbench.config.checks import nearest
from rlbench.config.schema import RewardConfig, RunConfig

_OPEN = ("rewards.components.", "data.task_params.", "watchdog.phase_limits_s.")  # mappings whose keys are the user's
CONFIG_ERRORS = (HydraException, OmegaConfBaseException)


def config_folder() -> Path:
    """conf/ beside the package in a checkout, inside the package in an installed wheel."""
    package = Path(rlbench.__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def register_schema() -> None:
    """Make RunConfig the type of the composed config: unknown keys and wrong types are errors."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


def to_run_config(composed: Any) -> RunConfig:
    """The composed config as dataclasses; their own checks run here.

    Raises:
        ValueError: a value is out of range, missing, or no valid choice.
    """
    known = set(schema_keys())
    for key, _ in leaves(OmegaConf.to_container(composed)):
        if key not in known and not is_open(key):
            raise ValueError(unknown_key(key))
    for key in sorted(OmegaConf.missing_keys(composed)):
        raise ValueError(f"{key} has no value, expected one: {key}=...")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    return config


def is_open(key: str) -> bool:
    """True for what lies in a mapping whose keys are the user's."""
    return key.startswith(_OPEN)


def group_choices(group: str) -> list[str]:
    """Names of the YAML files of a config group."""
    return sorted(file.stem for file in (config_folder() / group).glob("*.yaml"))


def resolve_model_shorthand(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Rewrite `model=X` to `model.path=X` where X is no file of conf/model but looks like a path or a hub id.

    Returns:
        The overrides and one line for each rewriting.
    """
    rewritten, notes = [], []
    for override in overrides:
        value = override.removeprefix("model=").strip("'\"")
        is_place = "/" in value or value.endswith(".gguf")
        if override.startswith("model=") and is_place and "," not in value and value not in group_choices("model"):
            rewritten.append(f"model.path='{value}'")
            notes.append(f"model={value} is read as model.path={value}")
        else:
            rewritten.append(override)
    return rewritten, notes


def explain_dashed_setting(arguments: Sequence[str]) -> str:
    """A sentence if a setting is written like a command-line option (--seed=3), else ""."""
    known = set(schema_keys())
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and (name in known or "." in name):
            return f"{argument} is no option: settings are written without dashes, {name}={value if equals else '...'}"
    return ""


def schema_keys(node: Any = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema."""
    instance = node() if isinstance(node, type) else node
    for field in fields(instance):
        key = f"{prefix}{field.name}"
        yield key
        value = getattr(instance, field.name)
        if is_dataclass(value):
            yield from schema_keys(value, f"{key}.")


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings; lists and empty mappings are values."""
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from leaves(value, f"{prefix}.{name}" if prefix else str(name))
    elif prefix:
        yield prefix, node


def explain_config_error(error: Exception, overrides: Sequence[str]) -> str:
    """One sentence for an error of composing: what, got, expected, nearest valid names."""
    if isinstance(error, MissingConfigException):
        return _explain_missing_config(error)
    root: BaseException = error
    while isinstance(root, ConfigCompositionException) and root.__cause__ is not None:
        root = root.__cause__
    text = " ".join(str(root).split())
    if isinstance(root, OverrideParseException):
        return _explain_unreadable(str(root.override))
    ambiguous = re.match(r"Ambiguous value for argument '(.*)' 1\. To use it as a list", text)
    if ambiguous:
        key, _, values = ambiguous.group(1).partition("=")
        return f"{key} has several values ({values}); add -m to sweep over them, or write {key}=[{values}] for a list"
    unknown = re.search(r"Key '([^']+)' (?:is )?not in", text)
    if unknown or "Could not override" in str(error):
        return _explain_unknown_key(unknown.group(1) if unknown else "", str(error), overrides)
    key = getattr(root, "full_key", None)
    message = re.sub(r" full_key: .*", "", text)
    return _explain_wrong_type(key, message) if key else message


_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


def _explain_unreadable(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals or not key:
        return f"cannot read the override {override!r}: expected key=value, e.g. optim.lr=1e-4"
    return f"cannot read the value of {override!r}: quote text with brackets, quotes or commas: '{key}=\"{value}\"'"


def _explain_wrong_type(key: str, message: str) -> str:
    kind = _type_of(key)
    expected = next((words for name, words in _WORDS.items() if kind in (name, name | None)), None)
    if expected is None:
        return f"{key}: {message}"
    value = re.match(r"Value ('.*') (?:of type|is not)", message)
    got = value.group(1) if value else "null" if "not Optional" in message else None
    return f"{key} is {got}, expected {expected}" if got else f"{key}: {message}; expected {expected}"


def _type_of(key: str) -> Any:
    """The annotation of a dotted key in the schema; None if there is none."""
    kind: Any = RunConfig
    for part in key.split("."):
        kind = get_type_hints(kind).get(part) if is_dataclass(kind) else None
    return kind


def _explain_unknown_key(last_part: str, message: str, overrides: Sequence[str]) -> str:
    named = re.search(r"Could not override '([^']+)'", message)
    key = named.group(1) if named else _override_key(last_part, overrides)
    if key == "exp":
        override = next((o for o in overrides if o.startswith("exp=")), "exp=...")
        return f"an experiment is added to the base config: write +{override}"
    return unknown_key(key)


def unknown_key(key: str) -> str:
    """The sentence for a key that the schema does not have."""
    if key.startswith(_OPEN):  # mappings whose keys the config makes: what it does not hold yet is added
        known = [f.name for f in fields(RewardConfig)]
        _, _, part = key.removeprefix(_OPEN[0]).partition(".")
        if key.startswith(_OPEN[0]) and part and part.split(".")[0] not in known:
            return f"there is no key {key!r}; nearest valid keys: {', '.join(nearest(part, known) or known)}"
        return f"{key} is not set, so it cannot be changed; to add it, write +{key}=..."
    guesses = nearest(key, schema_keys()) or [k for k in schema_keys() if k.startswith(key.rsplit(".", 1)[0] + ".")]
    return f"there is no key {key!r}; nearest valid keys: {', '.join(guesses) or ', '.join(group_names())}"


def _override_key(last_part: str, overrides: Sequence[str]) -> str:
    keys = [override.split("=", 1)[0].lstrip("+~") for override in overrides]
    return next((key for key in keys if key.rsplit(".", 1)[-1] == last_part), last_part)


def _explain_missing_config(error: MissingConfigException) -> str:
    name = error.missing_cfg_file or ""
    group, _, choice = name.rpartition("/")
    choices = group_choices(group) if group else group_names()
    if not choices:
        return f"there is no config group {group or name!r}; expected one of: {', '.join(group_names())}"
    guess = nearest(choice, choices, count=1)
    hint = f"; did you mean {guess[0]}?" if guess else ""
    places = _PLACES.get(group, "")
    return f"{group}={choice}: there is no such choice, expected one of: {', '.join(choices)}{places}{hint}"


_PLACES = {
    "model": ", or model.path=HUB_ID, FOLDER or FILE.gguf",
    "data": ", or data.path=FILE.jsonl",
}


def group_names() -> list[str]:
    return sorted(folder.name for folder in config_folder().iterdir() if folder.is_dir())
