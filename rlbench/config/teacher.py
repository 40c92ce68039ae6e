"""The teacher of on-policy distillation."""

from __future__ import annotations

from dataclasses import dataclass

from rlbench.config.checks import check_range


@dataclass
class TeacherConfig:
    """Of advantage=teacher. With neither an adapter nor a model the base itself teaches."""

    adapter: str | None = None  # folder of a finished run or of a PEFT adapter, on the run's base or on `model`
    model: str | None = None  # hub id, local folder, or GGUF file of another model with the same tokens, loaded beside
    gamma: float = 0.0  # discount of later tokens' gaps: 0 counts a token's own, 1 all that it leads to

    def __post_init__(self) -> None:
        check_range("algorithm.teacher.gamma", self.gamma, low=0, high=1)
