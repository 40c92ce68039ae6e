"""`python -m rlbench report RUN [RUN2 ...]`: the page of a run, or one that compares several."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlbench.commands.exit_status import exit_status


def report(arguments: Sequence[str]) -> int:
    """Exit status: 0 if the page was written, 2 for a wrong call, 4 if it cannot be written."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _report(options.runs, options.out, options.max_rollouts))


def _report(folders: Sequence[Path], out: Path | None, max_rollouts: int) -> None:
    from rlbench.report.run_folder import find_runs, unreadable_note
    from rlbench.report.run_report import write_run_report

    runs = [run for folder in folders for run in find_runs(folder)]
    if len(runs) > 1:
        from rlbench.report.comparison import choose_runs, write_comparison

        shown, left_out = choose_runs(runs)
        print(write_comparison(shown, out, left_out))
        if left_out:
            print(f"note: {left_out}", file=sys.stderr)
    else:
        print(write_run_report(runs[0], out, max_rollouts=max_rollouts))
    for run in runs:
        note = unreadable_note(run)
        if note:
            print(f"warning: {run}: {note}", file=sys.stderr)


def try_report(run_folder: Path) -> tuple[Path | None, str]:
    """The report of a run that has ended; a run must not fail because its page cannot be made.

    Returns:
        The page's path and "", or None and why there is none.
    """
    try:
        from rlbench.report.run_report import write_run_report

        return write_run_report(run_folder), ""
    except (Exception, KeyboardInterrupt) as error:  # whatever is wrong with the page, the run is done
        return None, f"no report was written ({type(error).__name__}: {error})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rlbench report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or of a sweep")
    parser.add_argument("--out", type=Path, help="the file (default: report.html in the run's folder)")
    parser.add_argument("--max-rollouts", type=_positive, default=10_000, help="most rollouts in the page")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}, expected at least 1")
    return number
