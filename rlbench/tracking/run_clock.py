"""Where a run stands in time: seconds by phase, and how long it still takes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NUM_RECENT_STEPS = 20  # steps whose mean duration predicts the next ones


class RunClock:
    """Counts time.

    Args:
        clock: monotonic seconds.

    Attributes:
        phase_seconds: time spent in each phase, without the phases nested in it: the values add up to wall time.
        num_steps: steps of the whole run; 0 while unknown.
        steps_done: optimizer steps applied.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        self.phase_seconds: dict[str, float] = {}
        self.num_steps = 0
        self.steps_done = 0
        self.started_at = clock()
        self.phase_started_at = self.started_at
        self._phases: list[str] = []
        self._counted_until = self.started_at
        self._durations: deque[float] = deque(maxlen=NUM_RECENT_STEPS)
        self._last_step_at: float | None = None

    @property
    def phase_name(self) -> str | None:
        """The innermost phase that is running."""
        return self._phases[-1] if self._phases else None

    @property
    def is_outermost(self) -> bool:
        """Whether at most one phase is running."""
        return len(self._phases) <= 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside for `name`; an enclosing phase stops meanwhile."""
        self._count()
        self._phases.append(name)
        outer_started_at, self.phase_started_at = self.phase_started_at, self.now()
        try:
            yield
        finally:
            self._count()
            self._phases.pop()
            self.phase_started_at = outer_started_at

    def all_seconds(self) -> dict[str, float]:
        """`phase_seconds`, and the rest of the time since the start as "between phases" if it is over 1%."""
        total = self.now() - self.started_at
        rest = total - sum(self.phase_seconds.values())
        return self.phase_seconds | ({"between phases": rest} if rest > 0.01 * total else {})

    def begin(self, num_steps: int, steps_done: int = 0) -> None:
        """Say how long the run is and, for a resumed run, where it starts."""
        self.num_steps, self.steps_done = num_steps, steps_done

    def step_done(self, step: int, num_steps: int, seconds: float | None) -> float | None:
        """Count a finished step.

        Args:
            step: optimizer steps applied now.
            num_steps: steps of the whole run.
            seconds: the step's own time, used for the first step; later ones count from line to line, so that
                evaluations and checkpoints are in the prediction.

        Returns:
            Seconds since the previous step, or `seconds` for the first.
        """
        now = self.now()
        duration = now - self._last_step_at if self._last_step_at is not None else seconds
        if duration is not None:
            self._durations.append(duration)
        self._last_step_at = now
        self.num_steps, self.steps_done = num_steps, step
        return duration

    def eta_s(self) -> float | None:
        """Seconds until the last step is done, from the mean of recent steps; None before the first step."""
        if not self._durations or self._last_step_at is None or not self.num_steps:
            return None
        mean = sum(self._durations) / len(self._durations)
        remaining = max(0, self.num_steps - self.steps_done)
        since_last_step = min(mean, self.now() - self._last_step_at)
        return max(0.0, mean * remaining - (since_last_step if remaining else 0.0))

    def _count(self) -> None:
        now = self.now()
        if self._phases:
            name = self._phases[-1]
            self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + now - self._counted_until
        self._counted_until = now
