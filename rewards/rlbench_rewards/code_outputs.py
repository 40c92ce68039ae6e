"""Whether a program's output is the expected one."""

from __future__ import annotations

import math

MODES = ("tokens", "lines", "exact")


def outputs_equal(actual: str, expected: str, mode: str = "tokens", float_tolerance: float = 0.0) -> bool:
    """Compare by whitespace-separated tokens, by lines without trailing space, or exactly.

    With a tolerance, two tokens that are both finite numbers are equal if they differ by at most
    `float_tolerance * max(1, |expected|)`; the mode "exact" knows no tolerance.
    """
    if mode == "exact":
        return actual == expected
    if mode == "lines":
        ours, theirs = _lines(actual), _lines(expected)
        rows = [(a.split(), e.split()) if float_tolerance else ([a], [e]) for a, e in zip(ours, theirs, strict=False)]
        return len(ours) == len(theirs) and all(_tokens_equal(a, e, float_tolerance) for a, e in rows)
    return _tokens_equal(actual.split(), expected.split(), float_tolerance)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _tokens_equal(actual: list[str], expected: list[str], tolerance: float) -> bool:
    pairs = zip(actual, expected, strict=False)
    return len(actual) == len(expected) and all(a == e or (tolerance and _close(a, e, tolerance)) for a, e in pairs)


def _close(actual: str, expected: str, tolerance: float) -> bool:
    if max(len(actual), len(expected)) > 400:
        return False
    try:
        number, gold = float(actual), float(expected)
    except ValueError:
        return False
    return math.isfinite(number) and math.isfinite(gold) and abs(number - gold) <= tolerance * max(1.0, abs(gold))
