"""What the user sees of a run: the plan, one line a step, live curves below, samples, the summary.

On a terminal with colours and the live view; anywhere else plain lines without control codes. Text that comes from
models or data is never interpreted as markup and shows control characters as escapes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlbench.records import Rollout
from rlbench.tracking import run_summary
from rlbench.tracking.formats import format_duration
from rlbench.tracking.intervals import difference_interval, wilson_interval
from rlbench.tracking.live_view import LiveView
from rlbench.tracking.run_clock import RunClock
from rlbench.tracking.run_log import RunLog
from rlbench.tracking.run_summary import AccuracyChange
from rlbench.tracking.safe_text import SafeFile, printable
from rlbench.tracking.sample_text import sample_parts
from rlbench.tracking.sparkline import BLOCKS
from rlbench.tracking.status_line import StatusLine
from rlbench.tracking.step_table import StepTable

PLAIN_WIDTH = 120  # columns of a log file
PLAIN_PROGRESS_EVERY_S = 10.0
MAX_PANEL_WIDTH = 120
BAR_CHARS = 20


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One line of the plan.

    Example:
        PlanRow("sizes", "tokens per microbatch", "4096", "derived: 2 GiB free for activations")
    """

    section: str  # rows of one section follow each other
    name: str
    value: str
    reason: str = ""  # where the value comes from; "" if the user set it


class RunConsole:
    """Prints a run.

    Args:
        is_terminal: True for colours and the live view, False for plain lines, None to look at the stream.
        quiet: print only the opening, warnings and the final summary.
        file: stream to write to; standard output by default.
        width: columns; by default the terminal's, else COLUMNS, else 120.
        clock: monotonic seconds.

    Printing never raises: characters that the stream cannot hold are escaped, and once the stream is gone (terminal
    closed, `| head`) the console is silent.
    """

    def __init__(
        self,
        is_terminal: bool | None = None,
        quiet: bool = False,
        *,
        file: Any = None,
        width: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = SafeFile(file or sys.stdout)
        self.log = RunLog()
        self._console = _make_console(stream, is_terminal, width)
        self.is_terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self.quiet = quiet
        self.clock = RunClock(clock)
        self._table = StepTable()
        self._progress: tuple[str, int, int, str] | None = None
        self._announced: set[str] = set()
        self._last_progress_at = clock()
        self._live = LiveView(is_ascii=not _can_hold(stream, BLOCKS))
        self._status = StatusLine(self._console, self._live_lines, clock) if self.is_terminal and not quiet else None

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Time by phase so far, nested phases counted once."""
        return self.clock.phase_seconds

    def begin(self, num_steps: int, steps_done: int = 0) -> None:
        """Tell the length of the run, so that progress can say which step is being made."""
        self.clock.begin(num_steps, steps_done)

    def opening(self, text: str) -> None:
        """In a quiet run the one line at its start, in place of all that is not printed."""
        if self.quiet:
            self._print(Text(printable(text)))

    def plan(self, rows: Sequence[PlanRow]) -> None:
        """Print the plan of the run: what will be done with what, and why each derived value is what it is."""
        if self.quiet:
            return
        width = max((len(printable(row.name)) for row in rows), default=0)
        for section, group in groupby(rows, key=lambda row: row.section):
            self._print(Text(printable(section), style="bold"))
            if self.is_terminal:
                self._print(_plan_table(list(group), width))
            else:
                self._print_plain_plan(list(group), width)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show and time a part of the run ("generation", "loading the model"). Phases may nest.

        Without a terminal, a phase is announced once, the first time it begins.
        """
        with self.clock.phase(name):
            outer, self._progress = self._progress, None
            self._last_progress_at = self.clock.now()
            self._show_phase(name)
            try:
                yield
            finally:
                self._progress = outer
                if self._status and self.clock.is_outermost:
                    self._status.hide()

    def progress(self, phase: str, done: int, total: int, unit: str) -> None:
        """Show how far a phase is: a live line, or a plain line at most every 10 s.

        Args:
            phase: its name.
            done: units done.
            total: units in all; 0 if unknown.
            unit: in words, for example "completions".
        """
        if self.quiet:
            return
        self._progress = (phase, done, total, unit)
        if self._status:
            self._status.show()
        elif self.clock.now() - self._last_progress_at >= PLAIN_PROGRESS_EVERY_S:
            self._last_progress_at = self.clock.now()
            self._print(self._status_text())

    def step_line(self, step: int, num_steps: int, metrics: Mapping[str, float | None]) -> None:
        """Print one aligned line for an optimizer step, a header above every 20; see `step_table` for the columns.

        Args:
            step: optimizer steps applied.
            num_steps: steps of the whole run.
            metrics: by stable key; columns without a value show "-".
        """
        seconds = self.clock.step_done(step, num_steps, metrics.get("time/step_s"))
        self._progress = None
        if self.quiet:
            return
        self._live.add(metrics)
        shown = {"time/step_s": seconds, **metrics}
        before, line = self._table.lines(step, num_steps, shown, self.clock.eta_s(), self._console.width)
        for note in before[:-1]:
            self._print(Text(note, style="dim"), is_prose=True)
        if before:
            self._print(Text(before[-1], style="bold"))
        self._print(Text(line))

    def sample(self, rollout: Rollout, step: int, advantage: float | None = None) -> None:
        """Print one completion: the end of its prompt, the text, the reward by component, the advantage."""
        if self.quiet:
            return
        title, parts = sample_parts(rollout, step, advantage)
        if not self.is_terminal:
            self._print(Text(title))
            lines = [line for heading, text in parts for line in (f"{heading}:", *text.split("\n"))]
            self._print(Text("\n".join(f"| {line}" for line in lines)))
            return
        body = Text("\n").join(Text.assemble((f"{heading}\n", "dim"), text) for heading, text in parts)
        width = min(self._console.width, MAX_PANEL_WIDTH)
        self._print(Panel(body, title=Text(title), title_align="left", border_style="dim", width=width))

    def evaluation(
        self,
        name: str,
        correct: int,
        total: int,
        interval: tuple[float, float] | None = None,
        previous: tuple[int, int] | None = None,
    ) -> None:
        """Print an accuracy with its 95% interval.

        Args:
            name: for example "gsm8k test, before training".
            correct: problems answered right.
            total: problems asked, at least 1.
            interval: lower and upper bound as shares; None computes Wilson's.
            previous: (correct, total) of an earlier evaluation to compare with.
        """
        low, high = interval or wilson_interval(correct, total)
        line = f"evaluation, {name}: {correct} of {total} right = {100 * correct / total:.1f}%"
        line += f" (95% interval {100 * low:.1f}% to {100 * high:.1f}%)"
        if previous is not None:
            difference = 100 * (correct / total - previous[0] / previous[1])
            low, high = difference_interval(*previous, correct, total)
            line += f", {difference:+.1f} points (95% {100 * low:+.1f} to {100 * high:+.1f})"
        self._live.add({"eval/accuracy": correct / total})
        if not self.quiet:
            self._print(Text(printable(line), style="bold"), is_prose=True)

    def note(self, text: str) -> None:
        """Print a line of information."""
        if not self.quiet:
            self._print(Text(printable(text, keep_newlines=True)), is_prose=True)

    def show(self, renderable: RenderableType) -> None:
        """Print a page of a command, quiet or not. Its texts must be harmless: see `safe_text.printable`."""
        self._print(renderable)

    def warning(self, text: str) -> None:
        """Print a line that the user should not miss, quiet or not."""
        self._print(Text(f"warning: {printable(text, keep_newlines=True)}", style="yellow"), is_prose=True)

    def error(self, text: str) -> None:
        """Why the run ends: to standard error, below all else that is printed."""
        self.close()
        print(printable(text, keep_newlines=True), file=SafeFile(sys.stderr))
        self.log.print(Text(printable(text, keep_newlines=True)))

    def summary(
        self,
        *,
        history: Sequence[Mapping[str, float | None]],
        headline: str = "",
        accuracy: AccuracyChange | None = None,
        sampled: str = "",
        learned: Mapping[str, str] | None = None,
        phase_seconds: Mapping[str, float] | None = None,
        files: Mapping[str, str | Path] | None = None,
        findings: Sequence[str] = (),
        next_commands: Sequence[str] = (),
    ) -> None:
        """Print what was learned, where the time went, where the files are and what to run next.

        Args:
            history: the metrics of each step in order.
            headline: for example "Finished 100 steps in 12m30s."
            accuracy: held-out evaluation before and after.
            sampled: what the last evaluation's sampled answers say; "": there are none.
            learned: metrics to compare between the first and the last steps, by their name in the text; none: rewards.
            phase_seconds: by phase; None takes what `phase` measured.
            files: path by what it is.
            findings: of the health rules, one line each.
            next_commands: printed whole, each on its own line, to be copied.
        """
        self.close()
        seconds = self.clock.all_seconds() if phase_seconds is None else phase_seconds
        lines = run_summary.learning_lines(history, learned) + (
            run_summary.accuracy_lines(accuracy) if accuracy else []
        )
        lines += [sampled] if sampled else []
        width = max((len(name) for name in files or {}), default=0)
        self._print(Text())
        self._print(Text(printable(headline or "Summary"), style="bold"))
        self._section("What was learned", lines, is_prose=True)
        self._section("Findings", findings, is_prose=True)
        self._section("Time by phase", run_summary.phase_lines(seconds))
        self._section("Files", [f"{name.ljust(width)}  {path}" for name, path in (files or {}).items()])
        self._section("What to run next", next_commands)

    def close(self) -> None:
        """Take the live line away; printing goes on to work."""
        if self._status:
            self._status.close()

    def _section(self, title: str, lines: Sequence[str], is_prose: bool = False) -> None:
        if lines:
            self._print(Text(title, style="bold"))
        for line in lines:
            self._print(Text(f"  {printable(line)}"), is_prose=is_prose)

    def _show_phase(self, name: str) -> None:
        if self.quiet:
            return
        if self._status:
            self._status.show()
        elif name not in self._announced:
            self._print(Text(f"{printable(name)} ..."))
        self._announced.add(name)

    def _status_text(self) -> Text:
        phase, done, total, unit = self._progress or (self.clock.phase_name or "working", 0, 0, "")
        elapsed = self.clock.now() - self.clock.phase_started_at
        parts = [printable(phase)]
        if unit:
            count = f"{done}/{total} {printable(unit)}" if total else f"{done} {printable(unit)}"
            parts = [f"{parts[0]} {self._bar(done, total)}{count}"]
        parts.append(format_duration(elapsed))
        if self.clock.steps_done < self.clock.num_steps:
            parts.append(f"step {self.clock.steps_done + 1}/{self.clock.num_steps}")
            eta_s = self.clock.eta_s()
            parts.append(_eta_text(eta_s, time.time()))
        return Text(" | ".join(parts), style="cyan")

    def _live_lines(self) -> list[Text]:
        view = self._live.lines(self._console.width - 1)
        return [*view, self._status_text()] if len(view) + 4 <= self._console.height else [self._status_text()]

    def _bar(self, done: int, total: int) -> str:
        if not self.is_terminal or not total or self._console.width < 100:
            return ""
        filled = round(BAR_CHARS * min(1.0, done / total))
        return f"[{'#' * filled}{'.' * (BAR_CHARS - filled)}] "

    def _print_plain_plan(self, rows: Sequence[PlanRow], width: int) -> None:
        for row in rows:
            reason = f"  ({printable(row.reason)})" if row.reason else ""
            self._print(Text(f"  {printable(row.name).ljust(width)}  {printable(str(row.value))}{reason}"))

    def _print(self, renderable: RenderableType, *, is_prose: bool = False) -> None:
        """Print above the live line. Only prose on a terminal is wrapped: the rest can be copied and grepped."""
        soft_wrap = isinstance(renderable, Text) and not (is_prose and self.is_terminal)
        with self._status.above() if self._status else nullcontext():
            self._console.print(renderable, soft_wrap=soft_wrap)
        self.log.print(renderable)


def _eta_text(eta_s: float | None, now: float) -> str:
    """ "ETA 1m02s, done at 14:07"; with the date where the run ends on another day."""
    if eta_s is None:
        return "ETA after the first step"
    end, today = time.localtime(now + eta_s), time.localtime(now)
    is_today = (end.tm_year, end.tm_yday) == (today.tm_year, today.tm_yday)
    return f"ETA {format_duration(eta_s)}, done at {time.strftime('%H:%M' if is_today else '%Y-%m-%d %H:%M', end)}"


def _can_hold(stream: SafeFile, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _make_console(stream: SafeFile, is_terminal: bool | None, width: int | None) -> Console:
    if is_terminal is None:  # not rich's rule, which FORCE_COLOR turns on for log files too
        is_terminal = stream.isatty()
    if width is None and not is_terminal:
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if columns.isdigit() and int(columns) > 0 else PLAIN_WIDTH
    file = cast(IO[str], stream)
    options: dict[str, Any] = {"color_system": "auto" if is_terminal else None}
    return Console(
        file=file,
        force_terminal=is_terminal,
        force_jupyter=False,
        markup=False,
        emoji=False,
        highlight=False,
        width=width,
        **options,
    )


def _plan_table(rows: Sequence[PlanRow], name_width: int) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(width=name_width + 2, no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", style="dim")
    for row in rows:
        name, value, reason = (Text(printable(str(part))) for part in (f"  {row.name}", row.value, row.reason))
        table.add_row(name, value, reason)
    return table
