"""Turn what data rows and reward plugins hand over into values that any JSON reader accepts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 20  # nested deeper, a value is stored as its repr: also ends reference cycles


def to_json(value: Any) -> str:
    """Serialise any Python value as strict ASCII JSON; never raises.

    NaN and infinities become the strings "nan", "inf", "-inf"; sets become lists; array scalars and arrays become
    numbers and lists; everything else that JSON lacks becomes its repr. Lone surrogates are escaped, so
    `json.loads` gives them back unchanged.
    """
    return json.dumps(to_plain(value), ensure_ascii=True, allow_nan=False)


def to_plain(value: Any, depth: int = 0) -> Any:
    """Replace whatever strict JSON cannot hold; see `to_json`."""
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if depth >= MAX_DEPTH:
        return _safe_repr(value)
    if isinstance(value, Mapping):
        return {_key(name): to_plain(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item, depth + 1) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return to_plain(value.tolist(), depth + 1)
    return _safe_repr(value)


def _key(name: Any) -> str:
    return name if isinstance(name, str) else _safe_repr(name)


def _safe_repr(value: Any) -> str:
    try:
        return repr(value)
    except Exception as error:  # a plugin's __repr__ may do anything; a record must not stop the run
        return f"<{type(value).__name__}, whose repr raised {type(error).__name__}>"
