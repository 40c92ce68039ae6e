"""JSON inside model text, read strictly: no duplicate keys, no NaN, bounded size and depth."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from typing import Any

MAX_CHARS = 100_000
MAX_DEPTH = 100

_OPENING = re.compile(r"```(?:json)?[ \t]*\n")
_CLOSING = re.compile(r"\n[ \t]*```")


class NotJson(ValueError):
    """The text holds no JSON value; the message says where it breaks."""


def whole_json(text: str) -> Any:
    """The JSON value that the whole text is.

    Raises:
        NotJson: it is none, has a key twice, NaN or Infinity, or is too large or too deep.
    """
    if len(text) > MAX_CHARS:
        raise NotJson(f"longer than {MAX_CHARS} characters")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise NotJson(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise NotJson("nested too deeply") from error
    except NotJson:
        raise
    except ValueError as error:  # a number of more digits than Python reads
        raise NotJson(f"not JSON: {error}") from error
    if _depth(value) > MAX_DEPTH:
        raise NotJson(f"nested deeper than {MAX_DEPTH}")
    return value


def fenced_json(text: str) -> Any:
    """The JSON value in the last fenced block, or the whole text if there is no block.

    Raises:
        NotJson: as `whole_json`.
    """
    block = _last_block(text[-MAX_CHARS:])
    return whole_json(text if block is None else block)


def _last_block(text: str) -> str | None:
    """In one pass, however many fences are never closed."""
    closings = [match.span() for match in _CLOSING.finditer(text)]
    starts = [start for start, _ in closings]
    position, block = 0, None
    while (opening := _OPENING.search(text, position)) is not None:
        place = bisect_left(starts, opening.end())
        if place == len(starts):
            break
        block, position = text[opening.end() : starts[place]], closings[place][1]
    return block


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise NotJson("a key occurs twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise NotJson(f"{name} is no JSON")


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        depth += 1
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if depth > MAX_DEPTH:
            break
    return depth
