"""Ticks and numbers of an axis."""

from __future__ import annotations

import math


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` of them, 1, 2 or 5 times a power of ten apart.

    Args:
        low: smallest value.
        high: largest value; equal to `low` widens the axis.
        count: wished number of intervals.
    """
    if not high > low:
        margin = abs(low) * 0.5 or 1.0
        low, high = (0.0, 2 * low) if low > 0 else (low - margin, high + margin)
    step = _round_step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def step_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Whole numbers inside [low, high]."""
    step = max(1.0, _round_step(max(high - low, 1.0) / count))
    inside = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [i * step for i in inside] or [low]


def tick_text(value: float, is_share: bool = False) -> str:
    """A tick in few characters: "0.25", "1.5k", "2e-05"; shares as percent."""
    if is_share:
        return f"{100 * value:.4g}%"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.1e}".replace(".0e", "e")
    if abs(value) >= 1e4:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}"


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if step <= power * factor * (1 + 1e-9))
