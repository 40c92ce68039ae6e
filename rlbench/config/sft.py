"""Every setting of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from rlbench.config.checks import check_choice, check_range


@dataclass
class SftConfig:
    rows_per_step: int | None = None  # rows of one optimizer step
    loss_on: str = "completion"  # completion (of conversations: every assistant turn) | all (the prompt too)

    def __post_init__(self) -> None:
        check_range("sft.rows_per_step", self.rows_per_step, low=1)
        check_choice("sft.loss_on", self.loss_on, ["completion", "all"])
