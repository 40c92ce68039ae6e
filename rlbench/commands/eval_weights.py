"""Which weights an evaluation is of: a run's checkpoint, or what a run starts with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlbench.commands.run_step import LAST, find_step, is_step_name
from rlbench.config.schema import RunConfig

if TYPE_CHECKING:
    from rlbench.training.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A policy that is evaluated."""

    name: str  # in messages and of its files
    run_folder: Path | None = None
    checkpoint: Checkpoint | None = None  # None: nothing is loaded over the weights that the policy starts with
    is_base: bool = False  # the base alone: what the policy starts with has no effect

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def policy_version(self) -> int:
        """Optimizer steps that made these weights."""
        return int(self.checkpoint.state["policy_version"]) if self.checkpoint else 0


def find_side(run_folder: Path, trained: RunConfig, which: str, said_by: str) -> tuple[Side, tuple[str, ...]]:
    """The policy of a run's checkpoint.

    Args:
        run_folder: of the run.
        trained: what it was trained with.
        which: "last", "best" (of checkpoint.keep_best) or a step.
        said_by: the option that gave it, for messages.

    Returns:
        The policy and a sentence for each newer checkpoint that is damaged.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    found = find_step(run_folder, which, trained, said_by)
    assert found.checkpoint is not None
    name = f"{found.label} of {run_folder}"
    return Side(name=name, run_folder=run_folder, checkpoint=found.checkpoint), found.passed_over


def split_place(text: str) -> tuple[Path, str]:
    """RUN@STEP, or RUN alone, which is its last step."""
    place, at, which = text.rpartition("@")
    if at and is_step_name(which):
        return Path(place).expanduser(), which
    return Path(text).expanduser(), LAST
