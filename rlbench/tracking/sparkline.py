"""A curve in one line of characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.-~=+*#"  # for streams that cannot hold BLOCKS
GAP = " "  # no value


def sparkline(
    values: Sequence[float | None],
    width: int,
    marks: str = BLOCKS,
    *,
    low: float | None = None,
    high: float | None = None,
) -> str:
    """One character a value; of more than `width` values the means of equally many neighbours.

    Args:
        values: in order; None and nan are gaps.
        width: most characters.
        marks: from the lowest to the highest.
        low: value of the lowest mark; None is the smallest value.
        high: value of the highest mark; None is the largest value. Equal to `low`: the middle mark.
    """
    means = resampled(values, width)
    known = [value for value in means if value is not None]
    if not known:
        return GAP * len(means)
    low, high = min(known) if low is None else low, max(known) if high is None else high
    return "".join(GAP if value is None else _mark(value, low, high, marks) for value in means)


def resampled(values: Sequence[float | None], width: int) -> list[float | None]:
    """At most `width` values: means of the finite ones among neighbours, None where there is none."""
    if len(values) <= width:
        return [_mean([value]) for value in values]
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    return [_mean(values[start:end]) for start, end in zip(edges[:-1], edges[1:], strict=True)]


def _mark(value: float, low: float, high: float, marks: str) -> str:
    share = (value - low) / (high - low) if high > low else 0.5
    return marks[min(len(marks) - 1, max(0, math.floor(share * len(marks))))]


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
