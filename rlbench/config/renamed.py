"""Settings of recorded runs that have another name now, or whose values have: they are read as what they meant."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_RENAMED: dict[str, tuple[str, dict[Any, Any]]] = {  # key: what it is now, and its values then and now
    "algorithm.scale_by_std": ("algorithm.advantage_scale", {True: "group", False: "none"}),
    "engine.dequantize": ("engine.dense_copies", {True: "base", False: "none", None: None}),
    "training.recompute": ("training.recompute", {"except_attention": "full"}),  # the same numbers, in less memory
}


def name_of_today(key: str, value: Any) -> tuple[str, Any]:
    """Key and value of a recorded setting as they are called now; most are called the same.

    Example:
        name_of_today("engine.dequantize", False)  # ("engine.dense_copies", "none")
    """
    name, values = _RENAMED.get(key, (key, {}))
    return (name, values[value]) if isinstance(value, str | bool | None) and value in values else (key, value)


def as_written(value: Any) -> str:
    """A value as an override has it: true and null, text without quotes."""
    return json.dumps(value) if value is None or isinstance(value, bool | list) else str(value)


def rename_settings(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings of a run under the names of today.

    Args:
        tree: config.yaml of the run, nested as it is there.

    Returns:
        The same with other names, and "KEY=VALUE is read as KEY=VALUE" for each of them that has a value.
    """
    found, changes = dict(tree), []
    for key in _RENAMED:
        section, _, name = key.partition(".")
        part = found.get(section)
        if not isinstance(part, dict) or name not in part:
            continue
        now, value = name_of_today(key, part[name])
        rest = {other: kept for other, kept in part.items() if other != name}
        new_name = now.removeprefix(f"{section}.")
        if (now, value) == (key, part[name]) or new_name in rest:
            continue
        found[section] = {new_name: value, **rest}
        if value is not None:  # else it was left open, as it is now
            changes.append(f"{key}={as_written(part[name])} is read as {now}={as_written(value)}")
    return found, changes
