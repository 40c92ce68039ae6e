"""Every setting of reward-model training."""

from __future__ import annotations

from dataclasses import dataclass

from rlbench.config.checks import check_range


@dataclass
class RewardModelConfig:
    pairs_per_step: int | None = None  # of one optimizer step
    centering_coef: float = 0.0  # weight of the squared sum of a pair's scores, which keeps scores near 0

    def __post_init__(self) -> None:
        check_range("reward_model.pairs_per_step", self.pairs_per_step, low=1)
        check_range("reward_model.centering_coef", self.centering_coef, low=0)
