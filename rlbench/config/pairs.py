"""Online preferences: pairs made of scored rollouts, and the settings of the policy gradient that they replace."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING

from rlbench.config.checks import check_choice, check_range

if TYPE_CHECKING:
    from rlbench.config.algorithm import AlgorithmConfig

CHOICES = ["none", "best_worst", "all"]
_READ_TOO = (  # keys of `algorithm` that mean the same with pairs
    "prompts_per_step", "group_size", "pairs", "num_updates", "num_minibatches", "reference_refresh_steps",
    "reference_refresh_frac", "mask_truncated", "overlong_buffer_tokens", "overlong_penalty", "max_refills",
    "curriculum",
)  # fmt: skip


@dataclass
class PairsConfig:
    """Unless `choice` is none, the update is that of the `preference` losses on pairs of each group's rollouts."""

    choice: str = "none"  # none | best_worst (one pair a group) | all (every two rollouts of a group)
    min_gap: float = 0.0  # rewards of a pair differ by at least this; equal ones never make a pair

    def __post_init__(self) -> None:
        check_choice("algorithm.pairs.choice", self.choice, CHOICES)
        check_range("algorithm.pairs.min_gap", self.min_gap, low=0)
        if self.min_gap and not self.is_on:
            raise ValueError(
                f"algorithm.pairs.min_gap is {self.min_gap}, but algorithm.pairs.choice is none; expected 0"
            )

    @property
    def is_on(self) -> bool:
        return self.choice != "none"


def check_unread_with_pairs(algorithm: AlgorithmConfig) -> None:
    """
    Raises:
        ValueError: pairs are on, and a setting of the policy gradient is not its default.
    """
    default = type(algorithm)()
    for name in (f.name for f in fields(algorithm) if f.name not in _READ_TOO):
        value = getattr(algorithm, name)
        if value == getattr(default, name):
            continue
        key, shown = f"algorithm.{name}", value
        if is_dataclass(value):
            part = next(f.name for f in fields(value) if getattr(value, f.name) != getattr(type(value)(), f.name))
            key, shown = f"{key}.{part}", getattr(value, part)
        raise ValueError(
            f"{key} is {shown}, but with algorithm.pairs.choice={algorithm.pairs.choice} the update is that of "
            f"preference.losses, which do not read it; expected its default"
        )
