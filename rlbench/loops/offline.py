"""What the loops over given rows do alike: a stream of rows, packed, one update a step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from rlbench.build import BaseInputs, BaseParts
from rlbench.data.packing import Microbatch
from rlbench.data.stream import PromptStream
from rlbench.loops.training_loop import TrainingLoop, samples_of
from rlbench.training.optim import learning_rate, set_lr
from rlbench.training.step import StepResult

InputsT = TypeVar("InputsT", bound=BaseInputs)
RowT = TypeVar("RowT")


@dataclass(slots=True)
class OfflineLoop(TrainingLoop[InputsT, BaseParts], Generic[InputsT, RowT]):
    """A loop fills in `rows`, `rows_per_step`, `row_tokens`, `_pack` and `_train`."""

    stream: PromptStream[RowT] = field(init=False)

    def __post_init__(self) -> None:
        TrainingLoop.__post_init__(self)
        config = self.inputs.config
        self.stream = PromptStream(self.rows(), seed=config.seed, shuffle=config.data.shuffle)

    def rows(self) -> Sequence[RowT]:
        """All that are trained on."""
        raise NotImplementedError

    def rows_per_step(self) -> int | None:
        raise NotImplementedError

    def row_tokens(self, row: RowT) -> int:
        """Packed tokens of a row alone."""
        raise NotImplementedError

    def work_on(self, rows: Sequence[RowT]) -> list[int]:
        """One update at the optimizer's present learning rate, outside the run's count; for the planner.

        Returns:
            Packed tokens of each microbatch.
        """
        _, microbatches = self._train(self._pack(rows))
        return [len(microbatch.token_ids) for microbatch in microbatches]

    def microbatch_sizes(self, rows: Sequence[RowT]) -> list[int]:
        """As `work_on`, without the update."""
        packed = self._pack(rows)
        return [len(microbatch.token_ids) for microbatch in getattr(packed, "microbatches", packed)]

    def _pack(self, rows: Sequence[RowT]) -> Any:
        """What `_train` reads: microbatches, or an object with `microbatches`."""
        raise NotImplementedError

    def _train(self, packed: Any) -> tuple[StepResult, Sequence[Microbatch]]:
        """One optimizer step, learning rate set; and the microbatches that it read."""
        raise NotImplementedError

    def _begin(self) -> None:
        pass

    def _state(self) -> dict[str, Any]:
        return {"stream": self.stream.state()}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.stream.restore(state["stream"])

    def _step(self, num_steps: int) -> None:
        start, config = time.monotonic(), self.inputs.config
        self._seconds = {}
        step = self.step + 1
        packed = self._pack(self.stream.next(self.rows_per_step() or 1))
        lr = learning_rate(step, num_steps, config.optim)
        set_lr(self.parts.optimizer, lr)
        with self._phase("update"):
            result, microbatches = self._train(packed)
        self._count_updates(int(result.is_applied), result.is_applied, result.metrics, samples_of(microbatches))
        metrics: dict[str, float | None] = {**result.metrics, **self._sizes(microbatches), "optim/lr": lr}
        metrics["data/epoch"] = float(self.stream.epoch)
        self.step = step
        self._log_step(step, metrics, start)
