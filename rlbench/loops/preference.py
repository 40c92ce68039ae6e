"""The loop of DPO and its family: rows of preferences, packing with shared prompts, update."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlbench.build import BaseParts
from rlbench.build_offline import PreferenceInputs
from rlbench.data.preferences import PreferenceRow
from rlbench.data.stream import PromptStream
from rlbench.loops.evaluate import Evaluation
from rlbench.loops.training_loop import TrainingLoop, samples_of
from rlbench.tracking.errors import TrackingError
from rlbench.training.optim import learning_rate, set_lr
from rlbench.training.preference_step import (
    PreferenceBatch,
    held_out_preferences,
    make_batch,
    preference_step,
    reference_table,
)

_REFERENCE_FILE = "reference_logps.json"


@dataclass(slots=True)
class PreferenceLoop(TrainingLoop[PreferenceInputs, BaseParts]):
    stream: PromptStream[PreferenceRow] = field(init=False)
    reference: dict[str, list[float]] | None = None  # by row_id; None: a forward each step, or no reference

    def __post_init__(self) -> None:
        TrainingLoop.__post_init__(self)
        config = self.inputs.config
        self.stream = PromptStream(self.inputs.train.rows, seed=config.seed, shuffle=config.data.shuffle)

    def _begin(self) -> None:
        if not self.inputs.config.preference.precompute_reference:
            return
        file = self.run_folder / _REFERENCE_FILE
        if self.step:
            self.reference = self._read_reference(file)
            return
        held_out = self.inputs.evaluation.rows if self.inputs.evaluation else ()
        with self._phase("reference"):
            self.reference = reference_table(
                self.parts.policy,
                [*self.inputs.train.rows, *held_out],
                is_base=self.inputs.config.preference.reference == "base",
                tokens_per_microbatch=self.inputs.config.training.tokens_per_microbatch or 1,
            )
        _write(file, self.reference)

    def _state(self) -> dict[str, Any]:
        return {"stream": self.stream.state()}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.stream.restore(state["stream"])

    def _step(self, num_steps: int) -> None:
        start, config = time.monotonic(), self.inputs.config
        self._seconds = {}
        step = self.step + 1
        batch = self._batch(self.stream.next(config.preference.pairs_per_step or 1))
        lr = learning_rate(step, num_steps, config.optim)
        set_lr(self.parts.optimizer, lr)
        with self._phase("update"):
            result = preference_step(
                self.parts.policy,
                batch,
                self.parts.optimizer,
                config.preference,
                max_grad_norm=config.optim.max_grad_norm,
                reference=self.reference,
            )
        self._count_updates(int(result.is_applied), result.is_applied, result.metrics, samples_of(batch.microbatches))
        metrics: dict[str, float | None] = {**result.metrics, **self._sizes(batch.microbatches), "optim/lr": lr}
        metrics["data/epoch"] = float(self.stream.epoch)
        self.step = step
        self._log_step(step, metrics, start)

    def _evaluate(self) -> None:
        if self.inputs.evaluation is None:
            return
        with self._phase("evaluation"):
            found = held_out_preferences(
                self.parts.policy,
                self._batch(self.inputs.evaluation.rows),
                self.inputs.config.preference,
                reference=self.reference,
            )
        metrics = {
            "eval/num": float(len(self.inputs.evaluation.rows)),
            "eval/loss": found["loss/preference"],
            "eval/margin": found["preference/margin"],
            "eval/preference_accuracy": found["preference/accuracy"],
        }
        self._log_evaluation(Evaluation(step=self.step, is_correct={}, metrics=metrics))
        self.console.note(
            f"evaluation, {len(self.inputs.evaluation.rows)} held-out rows after step {self.step}: "
            f"loss {metrics['eval/loss']:.4f}, margin {metrics['eval/margin']:.3f} nats, "
            f"{100 * metrics['eval/preference_accuracy']:.1f}% told apart"
        )

    def _batch(self, rows: Sequence[PreferenceRow]) -> PreferenceBatch:
        config = self.inputs.config
        return make_batch(
            rows,
            config.preference,
            tokens_per_microbatch=config.training.tokens_per_microbatch or 1,
            device=self.parts.policy.device,
        )

    def _read_reference(self, file: Path) -> dict[str, list[float]]:
        """
        Raises:
            ValueError: the file cannot be read, or lacks a row of the data.
        """
        try:
            table = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"resume: {file} cannot be read ({error}), and its policy is gone") from error
        held_out = self.inputs.evaluation.rows if self.inputs.evaluation else ()
        for row in [*self.inputs.train.rows, *held_out]:
            if row.row_id not in table:
                raise ValueError(
                    f"resume: {file} has no row {row.row_id}; expected the data of the run that is resumed"
                )
        return table


def _write(file: Path, table: Mapping[str, Sequence[float]]) -> None:
    """Whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(table))
        os.replace(temporary, file)
    except OSError as error:
        raise TrackingError.from_os_error("save the reference's logprobs to", file, error) from error
