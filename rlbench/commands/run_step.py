"""Which policy RUN and --step name: a run that trained one, and the checkpoint that a step of it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlbench.commands.chain_record import RECORD_NAME
from rlbench.config.full_training import FULL
from rlbench.config.recorded import recorded_config
from rlbench.config.schema import RunConfig
from rlbench.models.fingerprint import is_of_bytes

if TYPE_CHECKING:
    from rlbench.training.checkpoint import Checkpoint

LAST, BEST, BASE = "last", "best", "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a name such as "best" stands for.

    Example:
        Found(checkpoint=None)  # the base
    """

    checkpoint: Checkpoint | None  # None: the base without adapter
    passed_over: tuple[str, ...] = ()  # newer checkpoints that are damaged, a sentence each

    @property
    def label(self) -> str:
        return BASE if self.checkpoint is None else f"step {self.checkpoint.step}"


def policy_config(run_folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """`recorded_config` of a run that trained a policy.

    Raises:
        ValueError: no run is there, it trained no policy, or an override cannot be applied.
    """
    if (run_folder / RECORD_NAME).is_file():
        stages = ", ".join(str(file.parent) for file in sorted(run_folder.glob("*/config.yaml")))
        raise ValueError(
            f"{run_folder} is a chain of runs; expected the folder of one of its stages: {stages or 'none has begun'}"
        )
    config = recorded_config(run_folder, overrides)
    if config.stage == "reward_model":
        raise ValueError(
            f"{run_folder} is a run of stage=reward_model, which answers nothing: its result is an adapter with a head "
            "for scores, no language model; expected a run of stage=rl, sft or preference"
        )
    return config


def find_step(
    run_folder: Path, name: str, config: RunConfig, said_by: str = "--step", *, may_be_base: bool = False
) -> Found:
    """The checkpoint that `name` stands for, every file of it checked.

    Args:
        run_folder: of the run.
        name: a step, "last" (the newest valid checkpoint), "best" (of checkpoint.keep_best) or "base".
        config: of the run.
        said_by: option or command that gave the name, for errors.
        may_be_base: "base" is a name too.

    Raises:
        ValueError: no such step was kept, or its checkpoint is damaged.
    """
    if may_be_base and name == BASE:
        return Found(checkpoint=None)
    kept = checkpoint_folders(run_folder)
    said, names = f"{said_by} is {name or 'nothing'}", [*map(str, kept), LAST, BEST, *([BASE] if may_be_base else [])]
    if kept and not is_step_name(name):
        raise ValueError(f"{said}, expected one of: {', '.join(names)}")

    from rlbench.training.checkpoint import read_checkpoint

    passed_over: tuple[str, ...] = ()
    others = f"a step, {LAST} or {BASE}" if may_be_base else f"a step or {LAST}"
    if not kept or name in (LAST, BEST):
        newest = _newest(run_folder, kept, f", or {said_by} {BASE}" if may_be_base else "")
        if name == LAST:
            return newest
        assert newest.checkpoint is not None
        step, passed_over = _best_step(newest.checkpoint.state, config, said, others, kept), newest.passed_over
        said = f"{said}, which is step {step}"
    else:
        step = int(name)
    if step not in kept:
        raise ValueError(
            f"{said}, of which no checkpoint was kept in {run_folder}; expected one of: {', '.join(names)} "
            "(checkpoint.every_steps and checkpoint.keep_last decide)"
        )
    return Found(checkpoint=read_checkpoint(kept[step]), passed_over=passed_over)


def checkpoint_folders(run_folder: Path) -> dict[int, Path]:
    """By step, oldest first."""
    found = {f.name.removeprefix("step-"): f for f in (run_folder / "checkpoints").glob("step-*")}
    return dict(sorted((int(step), folder) for step, folder in found.items() if _is_number(step)))


def is_step_name(name: str) -> bool:
    """Whether a checkpoint can be meant."""
    return name in (LAST, BEST) or _is_number(name)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _newest(run_folder: Path, kept: dict[int, Path], otherwise: str) -> Found:
    """The newest checkpoint that is whole.

    Args:
        kept: from `checkpoint_folders`.
        otherwise: what else the user can ask for.
    """
    from rlbench.training.checkpoint import read_checkpoint

    damaged: list[str] = []
    for folder in reversed(kept.values()):
        try:
            checkpoint = read_checkpoint(folder)
        except ValueError as error:
            damaged.append(str(error))
            continue
        return Found(
            checkpoint=checkpoint, passed_over=tuple(f"{line}; an older checkpoint is taken" for line in damaged)
        )
    detail = f": {'; '.join(damaged)}" if damaged else ""
    raise ValueError(
        f"{run_folder} has no valid checkpoint{detail}; expected a run that saved one: at its end, when it was "
        f"stopped, or every checkpoint.every_steps{otherwise}"
    )


def _best_step(state: Mapping[str, Any], config: RunConfig, said: str, others: str, kept: dict[int, Path]) -> int:
    """Of the evaluation with the best checkpoint.keep_best until then, the first of equals, as the run chose it.

    Args:
        state: of the newest valid checkpoint.
        config: of the run.
        said: what was asked for, in words.
        others: what else the user can ask for.
        kept: from `checkpoint_folders`.
    """
    key, evaluations = config.checkpoint.keep_best, state["evaluations"]
    known = ", ".join(sorted({name for evaluation in evaluations for name in evaluation["metrics"]}))
    known = known or "none, the run made no evaluation"
    if not key:
        raise ValueError(
            f"{said}, but checkpoint.keep_best is null, so no step is the best; expected {others}, or a run with "
            f"checkpoint.keep_best as one of: {known}"
        )
    found = [(e["step"], e["metrics"][key]) for e in evaluations if key in e["metrics"]]
    if not found:
        raise ValueError(
            f"{said}, but no evaluation has checkpoint.keep_best={key}, expected one of: {known}; or {others}"
        )
    sign = -1.0 if key.endswith("loss") else 1.0
    step, value = max(found, key=lambda pair: sign * pair[1])
    if not step and step not in kept:
        raise ValueError(f"{said}, but the best {key} was that before the first step ({value:.4g}); expected {others}")
    return int(step)


def why_incomparable(checkpoint: Checkpoint, config: RunConfig) -> str:
    """Why the same weights have another fingerprint here than in their run; empty if they have not."""
    if is_of_bytes(checkpoint.state["adapter_fingerprint"]):
        return "an older rlbench took it, of the bytes"
    then = checkpoint.state["config"]["model"]["dtype"]
    if config.training.parameters != FULL or then == config.model.dtype:
        return ""
    return f"the weights were {then} then and are {config.model.dtype} now"
