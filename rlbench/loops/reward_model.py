"""Reward-model training: pairs, packing, update. What it leaves is a reward of `stage=rl` runs on the same base."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlbench.build import BaseParts
from rlbench.build_offline import PreferenceInputs
from rlbench.data.preferences import PreferenceRow
from rlbench.data.stream import PromptStream
from rlbench.loops.evaluate import Evaluation
from rlbench.loops.training_loop import TrainingLoop, samples_of
from rlbench.models.reward_model import RewardModel
from rlbench.training.optim import learning_rate, set_lr
from rlbench.training.reward_step import RewardBatch, held_out_rewards, make_reward_batch, reward_step


@dataclass(slots=True)
class RewardModelLoop(TrainingLoop[PreferenceInputs, BaseParts]):
    stream: PromptStream[PreferenceRow] = field(init=False)

    def __post_init__(self) -> None:
        TrainingLoop.__post_init__(self)
        config = self.inputs.config
        self.stream = PromptStream(self.inputs.train.rows, seed=config.seed, shuffle=config.data.shuffle)

    @property
    def model(self) -> RewardModel:
        policy = self.parts.policy
        assert isinstance(policy, RewardModel)
        return policy

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
        batch = self._batch(self.stream.next(config.reward_model.pairs_per_step or 1))
        lr = learning_rate(step, num_steps, config.optim)
        set_lr(self.parts.optimizer, lr)
        with self._phase("update"):
            result = reward_step(
                self.model,
                batch,
                self.parts.optimizer,
                centering_coef=config.reward_model.centering_coef,
                max_grad_norm=config.optim.max_grad_norm,
            )
        self._count_updates(int(result.is_applied), result.is_applied, result.metrics, samples_of(batch.microbatches))
        metrics: dict[str, float | None] = {**result.metrics, **self._sizes(batch.microbatches), "optim/lr": lr}
        metrics["data/epoch"] = float(self.stream.epoch)
        self.step = step
        self._log_step(step, metrics, start)

    def _evaluate(self) -> None:
        """Held-out pairs; mean and deviation of their scores become the model's scale."""
        if self.inputs.evaluation is None:
            return
        rows, coef = self.inputs.evaluation.rows, self.inputs.config.reward_model.centering_coef
        with self._phase("evaluation"):
            found, scores = held_out_rewards(self.model, self._batch(rows), centering_coef=coef)
        self.model.scale = (float(scores.double().mean()), float(scores.double().std()))
        metrics = {
            "eval/num": float(len(rows)),
            "eval/loss": found["loss/reward_model"],
            "eval/margin": found["reward_model/margin"],
            "eval/preference_accuracy": found["reward_model/accuracy"],
            "eval/score_mean": self.model.scale[0],
            "eval/score_std": self.model.scale[1],
        }
        self._log_evaluation(Evaluation(step=self.step, is_correct={}, metrics=metrics))
        self.console.note(
            f"evaluation, {len(rows)} held-out pairs after step {self.step}: loss {metrics['eval/loss']:.4f}, margin "
            f"{metrics['eval/margin']:.3f}, {100 * metrics['eval/preference_accuracy']:.1f}% told apart"
        )

    def _batch(self, rows: Sequence[PreferenceRow]) -> RewardBatch:
        budget = self.inputs.config.training.tokens_per_microbatch or 1
        return make_reward_batch(rows, tokens_per_microbatch=budget, device=self.parts.policy.device)
