"""Process rewards: another reward on each step of a completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from statistics import fmean
from typing import Any

from rlbench_rewards.contract import RewardError, RewardOutput, RewardSample, checked_value
from rlbench_rewards.loading import load_reward

REDUCTIONS = {"mean": fmean, "min": min, "last": lambda values: values[-1], "product": prod}


class StepwiseReward:
    """The reward `path` of every step, reduced to one number; the steps' values are in the details.

    A step is scored as the completion up to and including it if `is_cumulative`, as a step-wise reward model wants it,
    else alone. A step without a value makes the whole an error.

    Args:
        path, kwargs: of a reward of rlbench_rewards, e.g. rlbench_rewards.remote.RemoteReward.
        separator: between steps.
        reduce: "mean", "min", "last" or "product".
        is_cumulative: what a step is scored with.
        max_steps: more steps are not scored: the completion then scores 0.0.

    Raises:
        ValueError: an unknown reduction, an empty separator, or a reward that cannot be built.
    """

    def __init__(
        self,
        path: str,
        kwargs: Mapping[str, Any] | None = None,
        separator: str = "\n\n",
        reduce: str = "min",
        is_cumulative: bool = True,
        max_steps: int = 64,
    ) -> None:
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce is {reduce!r}, expected one of: {', '.join(REDUCTIONS)}")
        if not separator:
            raise ValueError("separator is empty, expected the text between two steps")
        self._reward = load_reward("step", path, kwargs or {})
        self._separator, self._reduce = separator, REDUCTIONS[reduce]
        self._is_cumulative, self._max_steps = is_cumulative, max_steps
        self.required_columns = getattr(self._reward.target, "required_columns", ())

    def __call__(self, sample: RewardSample) -> RewardOutput:
        steps = [step for step in sample.completion.split(self._separator) if step.strip()]
        if not steps:
            return RewardOutput(value=0.0, details={"reason": "no step"})
        if len(steps) > self._max_steps:
            return RewardOutput(value=0.0, details={"reason": f"more than {self._max_steps} steps"})
        texts = [self._separator.join(steps[: i + 1]) if self._is_cumulative else step for i, step in enumerate(steps)]
        values = self._values([replace(sample, completion=text) for text in texts])
        return RewardOutput(value=float(self._reduce(values)), details={"steps": values})

    def _values(self, samples: Sequence[RewardSample]) -> list[float]:
        values = []
        for output in self._reward.score(samples):
            value = checked_value(output).value
            if value is None:
                raise RewardError("the step's reward does not apply")
            values.append(value)
        return values
