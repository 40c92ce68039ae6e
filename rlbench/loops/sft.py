"""Supervised fine-tuning: rows, packing, update. Its adapter is where the other loops start (lora.init_from)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlbench.build import BaseParts
from rlbench.build_offline import SftInputs
from rlbench.data.packing import Microbatch, pack
from rlbench.data.stream import PromptStream
from rlbench.loops.evaluate import Evaluation
from rlbench.loops.training_loop import TrainingLoop, samples_of
from rlbench.records import TrainingSample
from rlbench.training.optim import learning_rate, set_lr
from rlbench.training.sft_step import held_out_loss, sft_step


@dataclass(slots=True)
class SftLoop(TrainingLoop[SftInputs, BaseParts]):
    stream: PromptStream[TrainingSample] = field(init=False)

    def __post_init__(self) -> None:
        TrainingLoop.__post_init__(self)
        config = self.inputs.config
        self.stream = PromptStream(self.inputs.train.samples, seed=config.seed, shuffle=config.data.shuffle)

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
        microbatches = self._pack(self.stream.next(config.sft.rows_per_step or 1))
        lr = learning_rate(step, num_steps, config.optim)
        set_lr(self.parts.optimizer, lr)
        with self._phase("update"):
            result = sft_step(
                self.parts.policy, microbatches, self.parts.optimizer, max_grad_norm=config.optim.max_grad_norm
            )
        self._count_updates(int(result.is_applied), result.is_applied, result.metrics, samples_of(microbatches))
        metrics: dict[str, float | None] = {**result.metrics, **self._sizes(microbatches), "optim/lr": lr}
        metrics["data/epoch"] = float(self.stream.epoch)
        self.step = step
        self._log_step(step, metrics, start)

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

    def _pack(self, samples: Any) -> list[Microbatch]:
        budget = self.inputs.config.training.tokens_per_microbatch or 1
        return pack(samples, tokens_per_microbatch=budget, device=self.parts.policy.device)
