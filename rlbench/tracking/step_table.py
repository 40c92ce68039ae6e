"""One aligned line a step, with a header now and then, cut to the width from the right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rlbench.tracking.formats import format_duration, format_fraction, format_number
from rlbench.tracking.metrics import component_names
from rlbench.tracking.safe_text import printable

HEADER_EVERY = 20  # lines
MAX_TITLE_CHARS = 8  # of a reward component's name


@dataclass(frozen=True, slots=True)
class Column:
    """A metric's place in the step line."""

    title: str
    key: str  # of the metric; "step" and "eta" are computed by the table
    width: int
    show: Callable[[float | None], str]
    is_optional: bool = False  # shown only in runs that log the key
    help: str = ""  # in the legend under the title; "" if the title says it


def _reward(value: float | None) -> str:
    text = "-" if value is None else f"{value:.3f}"
    return text if len(text) <= 6 else format_number(value)


def _kl(value: float | None) -> str:
    text = "-" if value is None else f"{value:.4f}"
    return text if len(text) <= 6 else format_number(value)


_AFTER_REWARDS = (
    Column("acc", "accuracy/train", 5, lambda v: format_fraction(v, 1), is_optional=True),
    Column("len", "completion/length_tokens_mean", 5, format_number, help="tokens a completion"),
    Column("nosig", "groups/no_signal_frac", 5, format_fraction, help="groups whose rewards are all equal"),
    Column("KL", "kl/reference", 6, _kl, is_optional=True, help="to the reference"),
    Column("clip", "loss/clip_frac", 5, lambda v: format_fraction(v, 1), help="tokens clipped"),
    Column("grad", "optim/grad_norm", 5, format_number, help="gradient norm"),
    Column("lr", "optim/lr", 7, lambda v: "-" if v is None else f"{v:.1e}"),
    Column("gen/s", "tokens/generation_per_s", 5, format_number, help="generated tokens a second"),
    Column("train/s", "tokens/training_per_s", 7, format_number, help="trained tokens a second"),
    Column("time", "time/step_s", 6, format_duration),
    Column("ETA", "eta", 6, format_duration),
)


# Of runs on given completions, which have no rewards: instead of what tells of rollouts.
_LOSSES = (
    Column("loss", "loss/nll", 7, _kl, is_optional=True, help="nats a token"),
    Column("loss", "loss/preference", 7, _kl, is_optional=True),
    Column("margin", "preference/margin", 7, _kl, is_optional=True, help="chosen less rejected, in nats"),
    Column("acc", "preference/accuracy", 6, lambda v: format_fraction(v, 1), is_optional=True, help="told apart"),
    Column("loss", "loss/reward_model", 7, _kl, is_optional=True),
    Column("margin", "reward_model/margin", 7, _kl, is_optional=True, help="score of chosen less rejected"),
    Column("acc", "reward_model/accuracy", 6, lambda v: format_fraction(v, 1), is_optional=True, help="told apart"),
)
_LOSS_KEYS = {column.key for column in _LOSSES}
_OF_ROLLOUTS = ("reward/mean", "completion/", "groups/", "loss/clip_frac", "tokens/generation_per_s")


class StepTable:
    """Lays out step lines; remembers which metrics a run has, so that columns do not jump."""

    def __init__(self) -> None:
        self._keys: dict[str, None] = {}  # metric keys seen so far, in order
        self._layout: tuple[list[Column], int] | None = None
        self._lines_since_header = 0
        self._left_out: list[str] = []  # titles that the width leaves no room for
        self._noted_left_out: list[str] = []  # those that the user was told about
        self._has_legend = False

    def lines(
        self, step: int, num_steps: int, metrics: Mapping[str, float | None], eta_s: float | None, width: int
    ) -> tuple[list[str], str]:
        """The step's line and what must come before it.

        Args:
            step: optimizer steps applied.
            num_steps: steps of the whole run.
            metrics: by key; a missing or None value shows as "-".
            eta_s: seconds until the run ends.
            width: columns of the terminal.

        Returns:
            Lines that come first (left-out columns, legend, header; often none), and the step's line.
        """
        self._keys.update(dict.fromkeys(metrics))
        columns, gap = self._fit(len(str(num_steps)) * 2 + 1, width)
        before = []
        if self._layout != (columns, gap) or self._lines_since_header >= HEADER_EVERY:
            before = [*self._notes(columns, width), _join([column.title for column in columns], columns, gap)]
            self._layout, self._lines_since_header = (columns, gap), 0
        self._lines_since_header += 1
        cells = [_cell(column, step, num_steps, metrics, eta_s) for column in columns]
        return before, _join(cells, columns, gap)

    def _columns(self, step_width: int) -> list[Column]:
        names = component_names(self._keys)
        rewards = [
            Column(_title(name), f"reward/{name}", max(6, len(_title(name))), _reward, is_optional=True)
            for name in names
        ]
        columns = [Column("step", "step", max(4, step_width), format_number), _REWARD, *rewards, *_AFTER_REWARDS]
        if _LOSS_KEYS & self._keys.keys():
            after = [column for column in _AFTER_REWARDS if not column.key.startswith(_OF_ROLLOUTS)]
            own = [column for column in _LOSSES if column.key in self._keys]
            columns = [columns[0], *own, *(c for c in after if not c.is_optional or c.key in self._keys)]
        is_double = "accuracy" in names  # accuracy/train is that component
        return [
            column
            for column in columns
            if not (column.is_optional and column.key not in self._keys)
            and not (is_double and column.key == "accuracy/train")
        ]

    def _fit(self, step_width: int, width: int) -> tuple[list[Column], int]:
        columns = self._columns(step_width)
        gap = 2 if _total(columns, 2) <= width else 1
        kept = list(columns)
        while len(kept) > 1 and _total(kept, gap) > width:
            kept.pop()
        self._left_out = [column.title for column in columns[len(kept) :]]
        return kept, gap

    def _notes(self, columns: list[Column], width: int) -> list[str]:
        notes = []
        if self._noted_left_out != self._left_out:
            self._noted_left_out = self._left_out
            if self._left_out:
                notes.append(f"left out at {width} columns: {', '.join(self._left_out)} (all are in metrics.jsonl)")
        if not self._has_legend:
            self._has_legend = True
            notes.append(" | ".join(f"{column.title}: {column.help}" for column in columns if column.help))
        return notes


_REWARD = Column("reward", "reward/mean", 6, _reward)


def _title(name: str) -> str:
    return printable(name)[:MAX_TITLE_CHARS]


def _cell(column: Column, step: int, num_steps: int, metrics: Mapping[str, float | None], eta_s: float | None) -> str:
    if column.key == "step":
        return f"{step}/{num_steps}"
    return column.show(eta_s if column.key == "eta" else metrics.get(column.key))


def _join(cells: list[str], columns: list[Column], gap: int) -> str:
    return (" " * gap).join(cell.rjust(column.width) for cell, column in zip(cells, columns, strict=True))


def _total(columns: list[Column], gap: int) -> int:
    return sum(column.width for column in columns) + gap * (len(columns) - 1)
