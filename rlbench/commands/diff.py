"""`python -m rlbench diff RUN_A RUN_B`: settings, numbers, curves, samples of two runs, in the terminal and as a page.

Both may still be going on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlbench.commands.exit_status import exit_status
from rlbench.report.curves import column
from rlbench.report.difference import (
    NumberDifference,
    SamePrompt,
    common_window,
    compared_keys,
    number_differences,
    same_prompts,
    setting_differences,
)
from rlbench.report.run_folder import RunRecord
from rlbench.tracking.console import RunConsole
from rlbench.tracking.formats import format_number
from rlbench.tracking.safe_text import printable, shorten
from rlbench.tracking.sparkline import sparkline

_CURVE_CHARS = 40
_PROMPT_CHARS, _COMPLETION_CHARS = 240, 500


def diff(arguments: Sequence[str]) -> int:
    """Exit status: 0 if the runs were compared, 2 for a wrong call, 4 if a file cannot be read or written."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _diff(options.run_a, options.run_b, options.out, options.samples))


def _diff(folder_a: Path, folder_b: Path, out: Path | None, num_samples: int) -> None:
    from rlbench.report.comparison import last_answers, paired_text, write_comparison
    from rlbench.report.rollout_files import read_files
    from rlbench.report.run_folder import load_run, unreadable_note

    a, b = load_run(folder_a), load_run(folder_b)
    if a.folder == b.folder:
        raise ValueError(f"RUN_A and RUN_B are both {folder_a}, expected the folders of two runs")
    page = write_comparison([folder_a, folder_b], out)
    (files_a, notes_a), (files_b, notes_b) = read_files(a.folder), read_files(b.folder)
    console = RunConsole()
    for label, run, more in (("A", a, notes_a), ("B", b, notes_b)):
        unreadable = unreadable_note(run.folder)
        if unreadable:
            print(f"warning: {label}: {unreadable}", file=sys.stderr)
        for note in [*run.notes, *more]:
            if note != unreadable:
                console.warning(f"{label}: {note}")
    window = common_window(a, b)
    parts: list[RenderableType] = [_heading("Runs"), _runs(a, b), _heading("Settings that differ"), _settings(a, b)]
    parts += [_heading(_numbers_title(window)), _numbers(number_differences(a, b, window))]
    answers_a, answers_b = last_answers(files_a), last_answers(files_b)
    if answers_a.keys() & answers_b.keys():
        parts.append(
            Text(f"  same held-out problems, last evaluations, B against A: {paired_text(answers_a, answers_b)}")
        )
    parts += [_heading("Curves, both on one scale"), _curves(a, b)]
    if num_samples:
        parts += [_heading("The same prompts"), *_samples(same_prompts(files_a, files_b, num_samples))]
    console.show(Group(*parts))
    console.note(f"\npage {page}")


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for number, name in enumerate(columns):
        # A key or metric stays whole in a narrow terminal, so that it can be searched for and copied.
        table.add_column(f"  {name}" if number == 0 else name, overflow="fold", no_wrap=number == 0)
    return table


def _runs(a: RunRecord, b: RunRecord) -> Table:
    table = _table("", "steps", "folder")
    for label, run in (("A", a), ("B", b)):
        done, planned = run.train[-1]["step"] if run.train else 0, run.config.get("training", {}).get("num_steps")
        steps = f"{done} of {planned}" if planned and planned != done else str(done)
        table.add_row(f"  {label}", steps, Text(printable(str(run.folder))))
    return table


def _settings(a: RunRecord, b: RunRecord) -> RenderableType:
    found = setting_differences(a, b)
    if not found:
        return Text("  none")
    table = _table("setting", "A", "B", "derived because")
    for item in found:
        reasons = {f"{label}: {reason}" for label, reason in (("A", item.reason_a), ("B", item.reason_b)) if reason}
        cells = (f"  {item.key}", item.a, item.b, "; ".join(sorted(reasons)))
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _numbers_title(window: Sequence[int]) -> str:
    if not window:
        return "Numbers: the runs have no step in common"
    return f"Numbers, means over steps {window[0]} to {window[-1]}, the last that both runs have"


def _numbers(found: Sequence[NumberDifference]) -> RenderableType:
    if not found:
        return Text("  none")
    table = _table("metric", "A", "B", "B - A", "two standard errors", "")
    for item in found:
        error = item.two_standard_errors
        verdict = "too few steps" if error is None else "differs" if item.is_clear else "no clear difference"
        if item.a == item.b:
            verdict = "equal"
        numbers = (item.a, item.b, item.difference)
        table.add_row(f"  {printable(item.key)}", *(format_number(n) for n in numbers), format_number(error), verdict)
    return table


def _curves(a: RunRecord, b: RunRecord) -> RenderableType:
    last = max((run.train[-1]["step"] for run in (a, b) if run.train), default=0)
    table = _table("metric", "", "curve", "last", "lowest to highest")
    for key in compared_keys(a, b):
        curves = [_points(run, key) for run in (a, b)]
        known = [value for _, values in curves for value in values if value is not None]
        if not known or min(known) == max(known):
            continue
        for label, (steps, values) in zip("AB", curves, strict=True):
            if not any(value is not None for value in values):
                continue
            width = max(1, round(_CURVE_CHARS * steps[-1] / max(last, 1)))
            line = sparkline(values, width, low=min(known), high=max(known))
            own = [value for value in values if value is not None]
            span = f"{format_number(min(own))} to {format_number(max(own))}"
            table.add_row(f"  {printable(key)}" if label == "A" else "", label, line, format_number(own[-1]), span)
    return table if table.row_count else Text("  none")


def _points(run: RunRecord, key: str) -> tuple[list[int], list[float | None]]:
    rows = run.evaluations if key.startswith("eval/") else run.train
    return [row["step"] for row in rows] or [0], column(rows, key)


def _samples(found: Sequence[SamePrompt]) -> list[RenderableType]:
    if not found:
        return [Text("  the runs recorded no step with the same prompts (tracking.save_rollouts)")]
    parts: list[RenderableType] = []
    for item in found:
        where = f"{'evaluation after step' if item.is_evaluation else 'step'} {item.step}"
        parts.append(Text(f"  {where}, {printable(item.a['prompt_id'])}", style="bold"))
        parts.append(Text(_clean(item.a["prompt_text"].strip(), _PROMPT_CHARS, keep="end"), style="dim"))
        table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, expand=True, header_style="dim")
        for label, row in (("A", item.a), ("B", item.b)):
            table.add_column(f"{label}: {_reward_text(row)}", ratio=1, overflow="fold")
        table.add_row(*(Text(_clean(row["completion_text"], _COMPLETION_CHARS)) for row in (item.a, item.b)))
        parts += [table, Text()]
    return parts


def _reward_text(row: Mapping[str, Any]) -> str:
    reward = "no reward" if row["reward"] is None else f"reward {row['reward']:.3f}"
    return f"{reward}, {len(row['token_ids'])} tokens" + (", cut" if row["finish_reason"] == "length" else "")


def _clean(text: str, max_chars: int, keep: str = "ends") -> str:
    return printable(shorten(text, max_chars, keep=keep), keep_newlines=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rlbench diff", description=__doc__)
    parser.add_argument("run_a", type=Path, metavar="RUN_A", help="folder of a run")
    parser.add_argument("run_b", type=Path, metavar="RUN_B", help="folder of another")
    parser.add_argument("--out", type=Path, help="the page (default: comparison.html in the folder that holds both)")
    parser.add_argument("--samples", type=_count, default=3, help="prompts whose completions are shown (default: 3)")
    return parser


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number of prompts, 0 or more")
    return int(text)
