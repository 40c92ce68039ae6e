"""Numbers and durations in few characters."""

from __future__ import annotations

import math


def format_duration(seconds: float | None) -> str:
    """At most 6 characters up to 99 days: "4.2s", "45s", "3m05s", "1h02m", "2d03h"; "-" for None or nan.

    Args:
        seconds: a duration, negative counts as 0.
    """
    if seconds is None or not math.isfinite(seconds):
        return "-"
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = whole // 60
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = minutes // 60
    return f"{hours // 24}d{hours % 24:02d}h"


def format_number(value: float | None) -> str:
    """Three significant digits in at most 5 characters plus sign, for 0.001 <= |value| < 1e9: "0.125", "21.7k"."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(float(value))
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= 0.9995 * limit:
            scaled = value / (1e3 if suffix == "k" else limit)
            return f"{scaled:.{_decimals(scaled)}f}{suffix}"
    if size >= 999.5:
        return f"{value:.0f}"
    if size and size < 0.001:
        return f"{value:.0e}"
    return f"{value:.{_decimals(value) if size >= 1 else 3}f}"


def _decimals(value: float) -> int:
    """Digits after the point so that three digits show: 1.23, 12.3, 123."""
    size = abs(value)
    return 0 if size >= 99.95 else 1 if size >= 9.995 else 2


def format_fraction(value: float | None, decimals: int = 0) -> str:
    """A share as percent: 0.25 -> "25%"; "-" for None."""
    if value is None:
        return "-"
    return f"{100 * value:.{decimals}f}%" if math.isfinite(value) else str(float(value))
