"""A straight line through measured points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True, slots=True)
class Line:
    """y = fixed + slope * x, neither below 0.

    Example:
        Line(fixed=1e8, slope=5e5).at(1000)
    """

    fixed: float
    slope: float

    def at(self, x: float) -> float:
        return self.fixed + self.slope * x

    def inverse(self, y: float) -> float:
        """The x at which y is reached; infinite for a flat line."""
        return (y - self.fixed) / self.slope if self.slope > 0 else float("inf")


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Least squares with both coefficients kept at 0 or above: sizes and times do not shrink as work grows.

    Raises:
        ValueError: fewer than two different x.
    """
    if len(set(xs)) < 2:
        raise ValueError(f"a line needs two different sizes, got {list(xs)}")
    mean_x, mean_y = fmean(xs), fmean(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    fixed = mean_y - slope * mean_x
    if slope < 0:
        return Line(max(0.0, mean_y), 0.0)
    if fixed < 0:
        return Line(0.0, sum(x * y for x, y in zip(xs, ys, strict=True)) / sum(x * x for x in xs))
    return Line(fixed, slope)
