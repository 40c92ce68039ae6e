"""All sinks of a run's metrics behind one object: metrics.jsonl, wandb, TensorBoard, the console."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial

from rlbench.tracking.console import RunConsole
from rlbench.tracking.errors import TrackingError
from rlbench.tracking.jsonl import JsonlWriter
from rlbench.tracking.tensorboard_tracker import TensorboardTracker
from rlbench.tracking.wandb_tracker import WandbTracker


class Tracker:
    """Logs a run. `metrics.jsonl` is the record and must work; the others are optional.

    Args:
        jsonl: the record on disk.
        num_steps: optimizer steps of the whole run.
        wandb: or None.
        console: or None.
        steps_done: steps applied before this process, in a resumed run.
        tensorboard: or None.
    """

    def __init__(
        self,
        jsonl: JsonlWriter,
        num_steps: int,
        wandb: WandbTracker | None = None,
        console: RunConsole | None = None,
        steps_done: int = 0,
        tensorboard: TensorboardTracker | None = None,
    ) -> None:
        self.jsonl = jsonl
        self.num_steps = num_steps
        self.wandb = wandb
        self._curves: dict[str, WandbTracker | TensorboardTracker] = {}
        if wandb is not None:
            self._curves["wandb"] = wandb
        if tensorboard is not None:
            self._curves["tensorboard"] = tensorboard
        self.console = console
        self._off: set[str] = set()
        if console is not None:
            self._try("console", lambda: console.begin(num_steps, steps_done))

    def log_step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Record the metrics of one optimizer step and print its line.

        Raises:
            TrackingError: if metrics.jsonl cannot be written; other sinks are turned off with one line instead.
            ValueError: if a metric is no number, text, bool or None.
        """
        self.jsonl.write(step, metrics, phase="train")
        console = self.console
        if console is not None:
            self._try("console", lambda: console.step_line(step, self.num_steps, metrics))
        self._draw(step, metrics)

    def log_evaluation(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Record an evaluation (`eval/...` keys); the caller prints it with `RunConsole.evaluation`.

        Raises:
            TrackingError, ValueError: as `log_step`.
        """
        self.jsonl.write(step, metrics, phase="eval")
        self._draw(step, metrics)

    def close(self) -> None:
        """Close every sink; waits for wandb no longer than its deadline."""
        self.jsonl.close()
        for name, sink in self._curves.items():
            self._try(name, sink.finish)
        if self.console is not None:
            self._try("console", self.console.close)

    def _draw(self, step: int, metrics: Mapping[str, float | None]) -> None:
        for name, sink in self._curves.items():
            self._try(name, partial(sink.log, step, metrics))

    def _try(self, sink: str, call: Callable[[], None]) -> None:
        if sink in self._off:
            return
        try:
            call()
        except Exception as error:  # an optional sink may fail in any way; the run goes on
            self._off.add(sink)
            reason = str(error) if isinstance(error, TrackingError) else f"{type(error).__name__}: {error}"
            self._say(f"{sink} is off for the rest of this run ({reason})")

    def _say(self, line: str) -> None:
        if self.console is not None and "console" not in self._off:
            self.console.warning(line)
        else:
            print(f"warning: {line}", file=sys.stderr)
