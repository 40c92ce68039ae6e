"""What a run of a sweep tells the process that started it: one number for an optimizer, or how it failed."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from rlbench.tracking.errors import TrackingError
from rlbench.tracking.jsonl import read_metrics


class RunFailed(Exception):
    """A run in a process of its own ended with the exit status `args[0]`, having said why."""


def sweep_objective(run_folder: Path, key: str) -> float | None:
    """What `hydra/sweeper=optuna` optimizes.

    Of an `eval/` key the last evaluation's value, of another the mean over the last quarter of steps.

    Args:
        run_folder: of the run that has ended.
        key: of metrics.jsonl, as `tracking.objective` names it.

    Returns:
        None, after one sentence, where the run did not record it.
    """
    try:
        rows = read_metrics(run_folder / "metrics.jsonl", "eval" if key.startswith("eval/") else "train")
    except TrackingError:
        rows = []  # the run ended before its first step and has said why
    values = [row[key] for row in rows if _is_number(row.get(key))]
    if not values:
        print(f"warning: tracking.objective is {key}, which {run_folder} did not record", file=sys.stderr)
        return None
    return values[-1] if key.startswith("eval/") else fmean(values[-max(1, len(values) // 4) :])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
