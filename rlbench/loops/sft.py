"""Supervised fine-tuning: rows, packing, update. Its adapter is where the other loops start (lora.init_from)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlbench.build_offline import SftInputs
from rlbench.data.packing import Microbatch, num_packed_tokens, pack
from rlbench.loops.evaluate import Evaluation
from rlbench.loops.offline import OfflineLoop
from rlbench.records import TrainingSample
from rlbench.training.sft_step import held_out_loss, sft_step
from rlbench.training.step import StepResult


@dataclass(slots=True)
class SftLoop(OfflineLoop[SftInputs, TrainingSample]):
    def rows(self) -> Sequence[TrainingSample]:
        return self.inputs.train.samples

    def rows_per_step(self) -> int | None:
        return self.inputs.config.sft.rows_per_step

    def row_tokens(self, row: TrainingSample) -> int:
        return num_packed_tokens([row])

    def _train(self, packed: list[Microbatch]) -> tuple[StepResult, Sequence[Microbatch]]:
        result = sft_step(
            self.parts.policy,
            packed,
            self.parts.optimizer,
            max_grad_norm=self.inputs.config.optim.max_grad_norm,
            budget=self.budget,
        )
        return result, packed

    def _evaluate(self) -> None:
        if self.inputs.evaluation is None:
            return
        with self._phase("evaluation"):
            found = held_out_loss(self.parts.policy, self._pack(self.inputs.evaluation.samples))
        metrics = {"eval/num": float(len(self.inputs.evaluation.samples)), "eval/loss": found["loss/nll"]}
        self._log_evaluation(Evaluation(step=self.step, is_correct={}, metrics=metrics))
        self.console.note(
            f"evaluation, {len(self.inputs.evaluation.samples)} held-out rows after step {self.step}: "
            f"{metrics['eval/loss']:.4f} nats a token"
        )

    def _pack(self, rows: Sequence[TrainingSample]) -> list[Microbatch]:
        room = self.budget.room_for(max(map(self.row_tokens, rows)))
        return pack(rows, tokens_per_microbatch=room, device=self.parts.policy.device)
