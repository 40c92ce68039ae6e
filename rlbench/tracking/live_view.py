"""What a terminal shows below the step table while a run goes on: curves, phase times."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.text import Text

from rlbench.tracking.formats import format_fraction, format_number
from rlbench.tracking.sparkline import ASCII, BLOCKS, resampled, sparkline

TWO_COLUMNS_FROM = 110  # columns of the terminal
NUM_STEPS_OF_BAR = 20
BAR = "━"
MIN_CURVE_CHARS, MAX_CURVE_CHARS, MAX_BAR_CHARS = 16, 40, 88
MAX_POINTS = 12 * MAX_CURVE_CHARS  # of a curve that are remembered
_NAME_CHARS, _NUMBERS_CHARS, _GAP_CHARS = 8, 22, 3
_COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")
_MIN_SHARE = 0.02  # of a step: smaller phases are "other"


@dataclass(frozen=True, slots=True)
class Series:
    """A metric of the live view.

    Example:
        Series("reward", "reward/mean")
    """

    name: str
    key: str
    is_share: bool = False


SERIES = (
    Series("reward", "reward/mean"),
    Series("accuracy", "eval/accuracy", is_share=True),
    Series("loss", "loss/nll"),
    Series("loss", "loss/preference"),
    Series("entropy", "policy/entropy"),
    Series("length", "completion/length_tokens_mean"),
    Series("grad", "optim/grad_norm"),
)


@dataclass(slots=True)
class _Curve:
    """A metric's values: all of a short run, of a longer one means of equally many neighbours."""

    points: list[float | None] = field(default_factory=list)
    last: float | None = None
    low: float = math.inf
    high: float = -math.inf
    num_known: int = 0
    _per_point: int = 1
    _waiting: list[float | None] = field(default_factory=list)  # of the point that is not whole yet

    def add(self, value: float | None) -> None:
        self.last = value
        if value is not None and math.isfinite(value):
            self.low, self.high, self.num_known = min(self.low, value), max(self.high, value), self.num_known + 1
        self._waiting.append(value)
        if len(self._waiting) == self._per_point:
            self.points += resampled(self._waiting, 1)
            self._waiting = []
        if len(self.points) == MAX_POINTS:
            self.points, self._per_point = resampled(self.points, MAX_POINTS // 2), 2 * self._per_point


class LiveView:
    """Remembers what was logged and draws it.

    Args:
        is_ascii: the terminal cannot show block characters.
    """

    def __init__(self, is_ascii: bool = False) -> None:
        self._marks, self._block = (ASCII, "#") if is_ascii else (BLOCKS, BAR)
        self._curves = {series.key: _Curve() for series in SERIES}
        self._times: deque[dict[str, float]] = deque(maxlen=NUM_STEPS_OF_BAR)

    def add(self, metrics: Mapping[str, float | None]) -> None:
        """Take in a step's metrics, or an evaluation's."""
        is_evaluation = any(key.startswith("eval/") for key in metrics)
        for series in SERIES:
            if series.key.startswith("eval/") == is_evaluation:  # a step without the number leaves a gap
                self._curves[series.key].add(metrics.get(series.key))
        times = {key.removeprefix("time/").removesuffix("_s"): value for key, value in metrics.items()
                 if key.startswith("time/") and value is not None}  # fmt: skip
        if "step" in times:
            self._times.append(times)

    def lines(self, width: int) -> list[Text]:
        """Of the view, none longer than `width`, an empty one first; none before the second step."""
        shown = [series for series in SERIES if self._curves[series.key].num_known > 1]
        if not shown or width < _NAME_CHARS + _NUMBERS_CHARS + _GAP_CHARS + 8:
            return []
        num_columns = 2 if width >= TWO_COLUMNS_FROM else 1
        room = (width - _GAP_CHARS * (num_columns - 1)) // num_columns - _NAME_CHARS - _NUMBERS_CHARS - 1
        longest = max(len(self._curves[series.key].points) for series in shown)
        curve_chars = min(room, max(MIN_CURVE_CHARS, min(MAX_CURVE_CHARS, longest)))
        cells = [self._cell(series, curve_chars) for series in shown]
        rows = [cells[i : i + num_columns] for i in range(0, len(cells), num_columns)]
        return [Text(), *(Text(" " * _GAP_CHARS).join(row) for row in rows), *self._phase_lines(width)]

    def _cell(self, series: Series, curve_chars: int) -> Text:
        curve = self._curves[series.key]
        show = format_fraction if series.is_share else format_number
        line = sparkline(curve.points, curve_chars, self._marks)
        numbers = f"{show(curve.last).rjust(6)}  {show(curve.low)} to {show(curve.high)}"
        return Text.assemble(
            (series.name.ljust(_NAME_CHARS), "bold"), (line.ljust(curve_chars), "cyan"), " ",
            numbers.ljust(_NUMBERS_CHARS)[:_NUMBERS_CHARS],
        )  # fmt: skip

    def _phase_lines(self, width: int) -> list[Text]:
        """A bar of the recent steps' time by phase, and its legend."""
        shares = self._shares()
        if not shares:
            return []
        room = min(MAX_BAR_CHARS, width - _NAME_CHARS)
        bar, legend = Text("time".ljust(_NAME_CHARS), style="bold"), Text(" " * _NAME_CHARS)
        edge = total = 0.0
        for number, (name, share) in enumerate(shares.items()):
            colour = "dim" if name == "other" else _COLOURS[number % len(_COLOURS)]
            total += share
            cells = round(total * room) - round(edge * room)
            edge = total
            bar.append(self._block * cells, style=colour)
            legend.append(self._block, style=colour).append(f" {name} {format_fraction(share)}  ", style="not bold")
        legend.truncate(width)
        return [bar, legend]

    def _shares(self) -> dict[str, float]:
        """Of the recent steps' time, largest phase first, "other" last."""
        whole = sum(times["step"] for times in self._times)
        if whole <= 0:
            return {}
        names = dict.fromkeys(name for times in self._times for name in times if name != "step")
        shares = {name: sum(times.get(name, 0.0) for times in self._times) / whole for name in names}
        large = {name: share for name, share in sorted(shares.items(), key=lambda item: -item[1])
                 if share >= _MIN_SHARE}  # fmt: skip
        rest = 1.0 - sum(large.values())
        return {name.replace("_", " "): share for name, share in large.items()} | (
            {"other": rest} if rest > 0.005 else {}
        )
