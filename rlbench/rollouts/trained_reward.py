"""Scores of trained reward models: in this process, on the run's own base, packed with shared prompts.

Shapes: B completions of one microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from rlbench.config.trained_reward import TrainedReward
from rlbench.data.packing import pack, with_next_token
from rlbench.models.reward_model import RewardModel
from rlbench.records import Completion, Prompt, TrainingSample
from rlbench_rewards import RewardOutcome
from rlbench_rewards.contract import ERROR, VALUE


class RewardModelScorer:
    """A reward model as a reward; it is never trained here."""

    def __init__(self, name: str, base: PreTrainedModel, reward: TrainedReward, *, tokens_per_microbatch: int) -> None:
        """
        Args:
            name: of the component.
            base: whose tensors are shared.
            reward: from `find_trained_rewards`.
            tokens_per_microbatch: packed tokens of one forward.

        Raises:
            ValueError: its adapter does not fit, or a scale is asked for and it has none.
        """
        self._model = RewardModel(base, reward.lora, seed=0)
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        self._budget = tokens_per_microbatch + 1  # the last token of a completion is an input too
        self._mean, self._std = 0.0, 1.0
        if reward.normalise == "held_out":
            if self._model.scale is None or not self._model.scale[1] > 0:
                raise ValueError(
                    f"rewards.components.{name}.kwargs.normalise is held_out, but the reward model was trained without "
                    "held-out pairs that give its scores a scale; expected none"
                )
            self._mean, self._std = self._model.scale

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[RewardOutcome]:
        """Outcomes of all completions of all prompts, one after the other; a score that is not finite is an error."""
        flat = [
            _sample(prompt, completion)
            for prompt, group in zip(prompts, completions, strict=True)
            for completion in group
        ]
        by_sample: dict[TrainingSample, float] = {}  # equal samples have equal scores
        for microbatch in pack(flat, tokens_per_microbatch=self._budget, device=self._model.device):
            for sample, value in zip(microbatch.samples, self._model.scores(microbatch).tolist(), strict=True):
                by_sample[sample] = value
        return [self._outcome(by_sample[sample]) for sample in flat]

    def _outcome(self, score: float) -> RewardOutcome:
        if not math.isfinite(score):
            return RewardOutcome(status=ERROR, message=f"the reward model's score is {score}, expected a finite number")
        return RewardOutcome(status=VALUE, value=(score - self._mean) / self._std, details={"score": score})


def _sample(prompt: Prompt, completion: Completion) -> TrainingSample:
    length = len(completion.token_ids)
    return with_next_token(
        TrainingSample(
            group_id=prompt.prompt_id,
            prompt_token_ids=prompt.token_ids,
            token_ids=completion.token_ids,
            sampling_logprobs=(0.0,) * length,
            advantages=(0.0,) * length,
            loss_mask=(True,) * length,
        )
    )
