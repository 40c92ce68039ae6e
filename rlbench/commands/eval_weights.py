"""Which weights an evaluation is of: a run's checkpoint, or what a run starts with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlbench.config.schema import RunConfig

if TYPE_CHECKING:
    from rlbench.training.checkpoint import Checkpoint

LAST, BEST = "last", "best"


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


def find_side(run_folder: Path, trained: RunConfig, which: str, key: str) -> tuple[Side, list[str]]:
    """The policy of a run's checkpoint.

    Args:
        run_folder: of the run.
        trained: what it was trained with.
        which: "last", "best" (of checkpoint.keep_best) or a step.
        key: the option that says so, for messages.

    Returns:
        The policy and one line for each newer checkpoint that is damaged, where the last one was asked for.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    folders = {int(f.name.removeprefix("step-")): f for f in sorted((run_folder / "checkpoints").glob("step-[0-9]*"))}
    if not folders:
        raise ValueError(
            f"{run_folder} holds no checkpoint; expected a run that has written one: at its end, when it was stopped, "
            "or every checkpoint.every_steps"
        )
    if which != LAST and which != BEST and not which.isdecimal():
        raise ValueError(f"{key} is {which}, expected last, best or one of {_listed(folders)}")

    from rlbench.training.checkpoint import read_checkpoint

    damaged: list[str] = []
    checkpoint = None
    if which.isdecimal():
        checkpoint = read_checkpoint(_folder_of(int(which), folders, run_folder, f"{key} is {which}"))
    for folder in reversed(folders.values()) if checkpoint is None else ():
        try:
            checkpoint = read_checkpoint(folder)
            break
        except ValueError as error:
            damaged.append(str(error))
    if checkpoint is None:
        raise ValueError(f"no checkpoint of {run_folder} can be used: {'; '.join(damaged)}")
    if which == BEST:
        step = _best_step(checkpoint, trained, key)
        checkpoint = read_checkpoint(_folder_of(step, folders, run_folder, f"{key} is best, which is step {step}"))
    return Side(name=f"step {checkpoint.step} of {run_folder}", run_folder=run_folder, checkpoint=checkpoint), damaged


def split_place(text: str) -> tuple[Path, str]:
    """RUN@STEP, or RUN alone, which is its last step."""
    place, at, which = text.rpartition("@")
    if at and (which in (LAST, BEST) or which.isdecimal()):
        return Path(place).expanduser(), which
    return Path(text).expanduser(), LAST


def _folder_of(step: int, folders: dict[int, Path], run_folder: Path, what: str) -> Path:
    if step not in folders:
        raise ValueError(f"{what}, but {run_folder} has no checkpoint of it; expected one of {_listed(folders)}")
    return folders[step]


def _best_step(newest: Checkpoint, trained: RunConfig, key: str) -> int:
    """Of the evaluations until then, as `TrainingLoop.best_step` has it."""
    metric = trained.checkpoint.keep_best
    if not metric:
        raise ValueError(
            f"{key} is best, but the run kept no best checkpoint; expected a step, or a run with e.g. "
            "checkpoint.keep_best=eval/accuracy evaluation.every_steps=10"
        )
    sign = -1.0 if metric.endswith("loss") else 1.0
    found = [e for e in newest.state["evaluations"] if metric in e["metrics"]]
    if not found:
        raise ValueError(f"{key} is best, but the run has no evaluation with {metric} yet; expected a step")
    return int(max(found, key=lambda e: sign * e["metrics"][metric])["step"])


def _listed(folders: dict[int, Path]) -> str:
    return ", ".join(map(str, folders))
