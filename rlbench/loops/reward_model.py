"""Reward-model training: pairs, packing, update. What it leaves is a reward of `stage=rl` runs on the same base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlbench.build_offline import PreferenceInputs
from rlbench.data.packing import Microbatch, num_packed_tokens
from rlbench.data.preferences import PreferenceRow
from rlbench.loops.evaluate import Evaluation
from rlbench.loops.offline import OfflineLoop
from rlbench.models.reward_model import RewardModel
from rlbench.training.reward_step import RewardBatch, held_out_rewards, make_reward_batch, reward_step
from rlbench.training.step import StepResult


@dataclass(slots=True)
class RewardModelLoop(OfflineLoop[PreferenceInputs, PreferenceRow]):
    @property
    def model(self) -> RewardModel:
        policy = self.parts.policy
        assert isinstance(policy, RewardModel)
        return policy

    def rows(self) -> Sequence[PreferenceRow]:
        return self.inputs.train.rows

    def rows_per_step(self) -> int | None:
        return self.inputs.config.reward_model.pairs_per_step

    def row_tokens(self, row: PreferenceRow) -> int:
        return 2 + num_packed_tokens(row.samples(0, 1))  # both keep their last token

    def _train(self, packed: RewardBatch) -> tuple[StepResult, Sequence[Microbatch]]:
        config = self.inputs.config
        result = reward_step(
            self.model,
            packed,
            self.parts.optimizer,
            centering_coef=config.reward_model.centering_coef,
            max_grad_norm=config.optim.max_grad_norm,
            budget=self.budget,
        )
        return result, packed.microbatches

    def _evaluate(self) -> None:
        """Held-out pairs; mean and deviation of their scores become the model's scale."""
        if self.inputs.evaluation is None:
            return
        rows, coef = self.inputs.evaluation.rows, self.inputs.config.reward_model.centering_coef
        with self._phase("evaluation"):
            found, scores = held_out_rewards(self.model, self._pack(rows), centering_coef=coef)
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

    def _pack(self, rows: Sequence[PreferenceRow]) -> RewardBatch:
        room = self.budget.room_for(max(map(self.row_tokens, rows)))
        return make_reward_batch(rows, tokens_per_microbatch=room, device=self.parts.policy.device)
