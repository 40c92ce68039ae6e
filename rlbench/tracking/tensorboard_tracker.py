"""TensorBoard as a sink: event files in the run's folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


def check_tensorboard() -> None:
    """
    Raises:
        ValueError: the package is not installed.
    """
    if find_spec("tensorboard") is None:
        raise ValueError(
            "tracking.tensorboard is true, but the package tensorboard is not installed; "
            "expected: pip install 'rlbench[tensorboard]'"
        )


class TensorboardTracker:
    """Writes `<folder>/tensorboard/events.*`; `tensorboard --logdir outputs` shows every run beside the others.

    Args:
        folder: the run's.
        steps_done: of a resumed run; TensorBoard then hides what an earlier process wrote beyond them.
    """

    def __init__(self, folder: Path, steps_done: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / FOLDER), purge_step=steps_done + 1 if steps_done else None)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One scalar a metric; what is no finite number is left out."""
        for key, value in metrics.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(key, value, global_step=step)
        self._writer.flush()  # a run that is killed keeps its curves

    def finish(self) -> None:
        self._writer.close()
