"""The documentation of a key: the comment that stands beside its field in the schema's source."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from rlbench.config.schema import RewardConfig, RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyDoc:
    """What the schema's source says about a key."""

    meaning: str  # "" where no comment stands beside the field
    type: str  # "float | None"
    place: str  # "rlbench/config/schema.py:234"


@dataclass(frozen=True, slots=True)
class _Field:
    meaning: str
    type: str
    line: int


def key_doc(key: str) -> KeyDoc:
    """Of a dotted key; of one inside a free mapping (a reward's keyword), that of the mapping.

    Raises:
        ValueError: the schema has no such key.
    """
    owner, name = _owner(key)
    found = _fields(owner)[name]
    file = Path(inspect.getfile(owner))
    place = f"{file.parts[-3]}/{file.parts[-2]}/{file.name}:{found.line}"
    return KeyDoc(meaning=found.meaning, type=found.type, place=place)


def schema_file(key: str) -> str:
    """Name of the file that holds the key's default."""
    return Path(inspect.getfile(_owner(key)[0])).name


def _owner(key: str) -> tuple[type, str]:
    """The dataclass that declares the key, and its field there."""
    kind: Any = RunConfig
    parts = key.split(".")
    for number, part in enumerate(parts):
        hints = get_type_hints(kind)
        if part not in hints:
            raise ValueError(f"there is no key {key!r}, expected one of the schema")
        if parts[:2] == ["rewards", "components"] and number == 1 and len(parts) > 3:
            return RewardConfig, parts[3]  # rewards.components.NAME.FIELD
        if not is_dataclass(hints[part]):
            return kind, part
        if number == len(parts) - 1:
            return kind, part
        kind = hints[part]
    raise AssertionError(key)


@cache
def _fields(owner: type) -> dict[str, _Field]:
    lines, first_line = inspect.getsourcelines(owner)
    source = textwrap.dedent("".join(lines))
    trailing, above = _comments(source)
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            beside = [trailing[line] for line in range(item.lineno, (item.end_lineno or item.lineno) + 1)
                      if line in trailing]  # fmt: skip
            meaning = " ".join(beside or list(_lines_above(above, item.lineno)))
            kind = ast.unparse(item.annotation)
            found[item.target.id] = _Field(meaning, kind, first_line + item.lineno - 1)
    return found


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by line: those behind code, and those that have a line of their own."""
    trailing, own = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("#").strip()
            (own if token.line.lstrip().startswith("#") else trailing)[token.start[0]] = text
    return trailing, own


def _lines_above(own: dict[int, str], line: int) -> Iterator[str]:
    first = line
    while first - 1 in own:
        first -= 1
    return (own[number] for number in range(first, line))
