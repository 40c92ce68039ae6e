"""Which training prompts a step draws, by what was measured of them."""

from __future__ import annotations

from dataclasses import dataclass

from rlbench.config.checks import check_range


@dataclass
class CurriculumConfig:
    """Prompts whose groups will probably hold right and wrong answers are drawn more often."""

    is_on: bool = False  # off: every prompt once an epoch
    component: str = "accuracy"  # the reward component that is 1 for a right answer
    prior_weight: float = 4.0  # answers that the rate of all prompts together counts for, in the estimate of each
    memory: float = 0.5  # share of its earlier answers that still counts when a prompt is answered again
    min_weight: float = 0.05  # of prompts that surely teach nothing, against 1 of those that surely teach

    def __post_init__(self) -> None:
        check_range("algorithm.curriculum.prior_weight", self.prior_weight, low=0, is_low_open=True)
        check_range("algorithm.curriculum.memory", self.memory, low=0, high=1)
        check_range("algorithm.curriculum.min_weight", self.min_weight, low=0, high=1, is_low_open=True)
