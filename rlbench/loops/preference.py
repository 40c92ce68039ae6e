"""The loop of DPO and its family: rows of preferences, packing with shared prompts, update."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlbench.build_offline import PreferenceInputs
from rlbench.data.packing import Microbatch, num_packed_tokens
from rlbench.data.preferences import PreferenceRow
from rlbench.loops.evaluate import Evaluation
from rlbench.loops.offline import OfflineLoop
from rlbench.tracking.errors import TrackingError
from rlbench.tracking.whole_file import write_whole
from rlbench.training.preference_step import (
    PreferenceBatch,
    held_out_preferences,
    make_batch,
    preference_step,
    reference_table,
)
from rlbench.training.step import StepResult

_REFERENCE_FILE = "reference_logps.json"


@dataclass(slots=True)
class PreferenceLoop(OfflineLoop[PreferenceInputs, PreferenceRow]):
    reference: dict[str, list[float]] | None = None  # by row_id; None: a forward each step, or no reference

    def rows(self) -> Sequence[PreferenceRow]:
        return self.inputs.train.rows

    def rows_per_step(self) -> int | None:
        return self.inputs.config.preference.pairs_per_step

    def row_tokens(self, row: PreferenceRow) -> int:
        """Unpaired completions are packed apart from each other: of the longer one."""
        parts = [(0,), (1,)] if self.inputs.config.preference.is_unpaired else [(0, 1)]
        return max(num_packed_tokens(row.samples(*indices)) for indices in parts)

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

    def _train(self, packed: PreferenceBatch) -> tuple[StepResult, Sequence[Microbatch]]:
        config = self.inputs.config
        result = preference_step(
            self.parts.policy,
            packed,
            self.parts.optimizer,
            config.preference,
            max_grad_norm=config.optim.max_grad_norm,
            reference=self.reference,
            budget=self.budget,
        )
        return result, packed.microbatches

    def _evaluate(self) -> None:
        if self.inputs.evaluation is None:
            return
        with self._phase("evaluation"):
            found = held_out_preferences(
                self.parts.policy,
                self._pack(self.inputs.evaluation.rows),
                self.inputs.config.preference,
                reference=self.reference,
            )
        metrics = {
            "eval/num": float(len(self.inputs.evaluation.rows)),
            "eval/loss": found["loss/preference"],
            "eval/preference_accuracy": found["preference/accuracy"],
        }
        margin = found.get("preference/margin")  # None: single completions of one label alone
        if margin is not None:
            metrics["eval/margin"] = margin
        self._log_evaluation(Evaluation(step=self.step, is_correct={}, metrics=metrics))
        self.console.note(
            f"evaluation, {len(self.inputs.evaluation.rows)} held-out rows after step {self.step}: "
            f"loss {metrics['eval/loss']:.4f}, {'' if margin is None else f'margin {margin:.3f} nats, '}"
            f"{100 * metrics['eval/preference_accuracy']:.1f}% told apart"
        )

    def _pack(self, rows: Sequence[PreferenceRow]) -> PreferenceBatch:
        return make_batch(
            rows,
            self.inputs.config.preference,
            tokens_per_microbatch=self.budget.room_for(max(map(self.row_tokens, rows))),
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
    try:
        write_whole(file, json.dumps(table))
    except OSError as error:
        raise TrackingError.from_os_error("save the reference's logprobs to", file, error) from error
