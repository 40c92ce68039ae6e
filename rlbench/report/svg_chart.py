"""A chart as static SVG: readable without scripts; colours come from the page's style sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from rlbench.report.axes import step_ticks, tick_text, ticks
from rlbench.report.curves import Chart, Curve
from rlbench.report.markup import Html, join, tag

WIDTH, HEIGHT = 480, 232
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 36
NUM_COLOURS = 8
MARKS_WIDTH, MARK_DISTANCE = 48.0, 5.0  # pixels that the marks of several curves at one step take; between two of them
Scale = Callable[[float], float]
Point = tuple[float, float]


def draw(chart: Chart) -> Html:
    """The chart's SVG: grid, axes, bands, lines, marks and limits."""
    curves = _stacked(chart.curves) if chart.is_stacked else list(chart.curves)
    x_low, x_high = _x_range(curves)
    y_ticks = _y_ticks(chart, curves)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - x_low) / (x_high - x_low)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - y_low) / (y_high - y_low))

    drawn = list(zip(colours(chart), curves, strict=True))
    parts = [_grid(chart, y_ticks, x, y, x_low, x_high)]
    if chart.is_stacked:
        parts += [_layer(curve, i, x, y) for i, curve in drawn]
    else:
        parts += [_band(curve, i, x, y) for i, curve in drawn if curve.low and not curve.is_points]
        parts += [_line(c, i, x, y) for i, c in drawn if not c.is_points]
        points = [(i, c) for i, c in drawn if c.is_points]
        middle, distance = (len(points) - 1) / 2, _mark_distance(len(points))
        parts += [_marks(c, i, x, y, distance * (place - middle)) for place, (i, c) in enumerate(points)]
    parts += [_limit(label, value, y) for label, value in chart.limits.items() if y_low <= value <= y_high]
    parts.append(tag("line", class_="cursor", y1=TOP, y2=HEIGHT - BOTTOM, x1=LEFT, x2=LEFT, visibility="hidden"))
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=describe(chart))


def colours(chart: Chart) -> list[int]:
    """Number of each curve's colour; from NUM_COLOURS on they come again, dashed."""
    return [i if curve.colour is None else curve.colour for i, curve in enumerate(chart.curves)]


def colour_class(number: int) -> str:
    dash = number // NUM_COLOURS
    return f"c{number % NUM_COLOURS}" + (f" dash{min(dash, 2)}" if dash else "")


def x_range(chart: Chart) -> tuple[float, float]:
    """First and last step of the axis."""
    return _x_range(chart.curves)


def describe(chart: Chart) -> str:
    """The chart in a sentence, for those who do not see it."""
    parts = []
    for curve in chart.curves:
        known = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if v is not None]
        if known:
            (s1, v1), (s2, v2) = known[0], known[-1]
            first, last = (tick_text(round(v, 6), chart.is_share) for v in (v1, v2))
            parts.append(f"{curve.label} from {first} at step {s1:g} to {last} at step {s2:g}")
    return f"{chart.title}{f' in {chart.unit}' if chart.unit else ''}: " + "; ".join(parts)


def _stacked(curves: Sequence[Curve]) -> list[Curve]:
    """Each curve on top of those before it: `low` is the sum below, `high` and `values` the sum with it."""
    below = [0.0] * len(curves[0].steps) if curves else []
    layers = []
    for curve in curves:
        above = [base + (value or 0.0) for base, value in zip(below, curve.values, strict=True)]
        layers.append(Curve(label=curve.label, steps=curve.steps, values=above, low=below, high=above))
        below = above
    return layers


def _x_range(curves: Sequence[Curve]) -> tuple[float, float]:
    steps = [step for curve in curves for step in (curve.steps[0], curve.steps[-1])]
    low, high = min(steps), max(steps)
    if high == low:
        return low - 0.5, high + 0.5
    num_points = sum(curve.is_points for curve in curves)
    room = _mark_distance(num_points) * (num_points - 1) / 2 / (WIDTH - LEFT - RIGHT) if num_points > 1 else 0.0
    return low - room * (high - low), high + room * (high - low)


def _mark_distance(num_curves: int) -> float:
    return min(MARK_DISTANCE, MARKS_WIDTH / max(num_curves, 1))


def _y_ticks(chart: Chart, curves: Sequence[Curve]) -> list[float]:
    values = [v for c in curves for part in (c.values, c.low, c.high) for v in part if v is not None]
    low, high = min(values), max(values)
    near = [limit for limit in chart.limits.values() if limit <= 3 * high]  # a far limit would flatten the curve
    high = max([high, *near])
    if chart.starts_at_zero and low > 0:
        low = 0.0
    if chart.is_share:
        low, high = max(low, 0.0), min(high, 1.0)
    return ticks(low, high)


def _grid(chart: Chart, y_ticks: Sequence[float], x: Scale, y: Scale, x_low: float, x_high: float) -> Html:
    parts = []
    for value in y_ticks:
        parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=_r(y(value)), y2=_r(y(value))))
        text = tick_text(value, chart.is_share)
        parts.append(tag("text", text, class_="tick y", x=LEFT - 6, y=_r(y(value) + 4)))
    for step in step_ticks(x_low, x_high):
        parts.append(tag("text", tick_text(step), class_="tick x", x=_r(x(step)), y=HEIGHT - BOTTOM + 16))
    parts.append(tag("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM))
    parts.append(tag("text", "step", class_="label", x=WIDTH - RIGHT, y=HEIGHT - 4))
    return join(*parts)


def _runs(curve: Curve, x: Scale, y: Scale) -> list[list[Point]]:
    """Points of each stretch without a gap."""
    pairs = list(zip(curve.steps, curve.values, strict=True))
    stretches = groupby(pairs, key=lambda pair: pair[1] is not None)
    return [[(x(s), y(v)) for s, v in stretch if v is not None] for is_known, stretch in stretches if is_known]


def _line(curve: Curve, index: int, x: Scale, y: Scale) -> Html:
    parts = []
    for points in _runs(curve, x, y):
        if len(points) == 1:
            parts.append(
                tag("circle", cx=_r(points[0][0]), cy=_r(points[0][1]), r=2.5, class_=f"mark {colour_class(index)}")
            )
        else:
            parts.append(tag("path", d=_path(points), class_=f"line {colour_class(index)}"))
    return join(*parts)


def _band(curve: Curve, index: int, x: Scale, y: Scale) -> Html:
    rows = zip(curve.steps, curve.low, curve.high, strict=True)
    parts = []
    for is_known, stretch in groupby(rows, key=lambda row: row[1] is not None and row[2] is not None):
        known = [(s, a, b) for s, a, b in stretch if is_known and a is not None and b is not None]
        if len(known) > 1:
            outline = [(x(s), y(b)) for s, _, b in known] + [(x(s), y(a)) for s, a, _ in reversed(known)]
            parts.append(tag("path", d=_path(outline) + "Z", class_=f"band {colour_class(index)}"))
    return join(*parts)


def _layer(curve: Curve, index: int, x: Scale, y: Scale) -> Html:
    known = list(zip(curve.steps, curve.low, curve.high, strict=True))
    if len(known) == 1:  # one step has no area: a bar
        ((_, low, high),) = known
        top, bottom = y(high or 0.0), y(low or 0.0)
        return tag(
            "rect", x=LEFT + 8, width=40, y=_r(top), height=_r(bottom - top), class_=f"layer {colour_class(index)}"
        )
    outline = [(x(s), y(b or 0.0)) for s, _, b in known] + [(x(s), y(a or 0.0)) for s, a, _ in reversed(known)]
    return tag("path", d=_path(outline) + "Z", class_=f"layer {colour_class(index)}")


def _marks(curve: Curve, index: int, x: Scale, y: Scale, shift: float) -> Html:
    parts = []
    low = curve.low or [None] * len(curve.steps)
    high = curve.high or [None] * len(curve.steps)
    for step, value, a, b in zip(curve.steps, curve.values, low, high, strict=True):
        if value is None:
            continue
        place = _r(x(step) + shift)
        if a is not None and b is not None:
            parts.append(tag("line", x1=place, x2=place, y1=_r(y(a)), y2=_r(y(b)),
                             class_=f"line {colour_class(index)}"))  # fmt: skip
        parts.append(tag("circle", cx=place, cy=_r(y(value)), r=4, class_=f"mark {colour_class(index)}"))
    return join(*parts)


def _limit(label: str, value: float, y: Scale) -> Html:
    height = _r(y(value))
    return join(
        tag("line", class_="limit", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height),
        tag("text", f"{label} {tick_text(value)}", class_="limit-label", x=WIDTH - RIGHT, y=height - 4),
    )


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{_r(a)} {_r(b)}" for a, b in points)


def _r(value: float) -> float:
    return round(value, 1)
