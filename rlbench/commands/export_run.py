"""What `export` is asked for, and the weights of a run that it names."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlbench.commands.command_line import CommandLine
from rlbench.commands.run_step import LAST, checkpoint_folders, find_step, policy_config
from rlbench.config.checks import check_choice
from rlbench.config.full_training import FULL
from rlbench.config.schema import RunConfig
from rlbench.models.fingerprint import is_of_bytes
from rlbench.tracking.jsonl import read_metrics

USAGE = (
    "python -m rlbench export RUN DEST [--step N|last|best] [--format merged|adapter] [--dtype bfloat16|float32] "
    "[--rounding nearest|stochastic] [--base trained|original] [model.path=...]"
)
MERGED, ADAPTER = "merged", "adapter"
NEAREST, STOCHASTIC = "nearest", "stochastic"
TRAINED, ORIGINAL = "trained", "original"
_CHOICES = {
    "format": ([MERGED, ADAPTER], "merged weights, or PEFT's folder (default: merged)"),
    "dtype": (["bfloat16", "float32"], "of merged weights (default: the run's own)"),
    "rounding": ([NEAREST, STOCHASTIC], "to bfloat16 (default: stochastic where an adapter is merged)"),
    "base": ([TRAINED, ORIGINAL], "of a quantised one: what was trained on, or the 16 bits (default: trained)"),
}
_OVERRIDES = ("model.path", "model.cache_dir")  # where the base lies now


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """A call, checked, with defaults filled in."""

    run_folder: Path
    destination: Path
    step: str  # a number, "last" or "best"
    format: str  # merged | adapter
    dtype: str  # bfloat16 | float32
    rounding: str  # nearest | stochastic
    base: str  # trained | original


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedWeights:
    """Where they lie, as `Policy.load` takes them."""

    folder: Path  # that holds adapter/ or model/
    step: int
    fingerprint: str  # as the run recorded it; "": none that can be compared
    origin: str  # in words
    warnings: tuple[str, ...] = ()


def read_call(arguments: Sequence[str]) -> tuple[ExportOptions, RunConfig]:
    """The call and the run's config. Loads no torch.

    Raises:
        ValueError: anything a user can get wrong.
    """
    given, run_folder, destination, overrides = _parse(arguments)
    for override in overrides:
        if override.partition("=")[0] not in _OVERRIDES:
            raise ValueError(
                f"export takes the settings of the run, so {override} is not read; expected none but "
                f"{' and '.join(_OVERRIDES)}, which say where the base lies"
            )
    config = policy_config(run_folder, overrides)
    _check(given, config)
    check_destination(destination)
    dtype = "float32" if given.format == ADAPTER else given.dtype or config.model.dtype
    is_exact = dtype == "float32" or config.training.parameters == FULL  # nothing is added to 16-bit weights
    return (
        ExportOptions(
            run_folder=run_folder,
            destination=destination,
            step=given.step,
            format=given.format or MERGED,
            dtype=dtype,
            rounding=given.rounding or (NEAREST if is_exact else STOCHASTIC),
            base=given.base or TRAINED,
        ),
        config,
    )


def check_destination(folder: Path) -> None:
    """
    Raises:
        ValueError: something is there.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"DEST is {folder}, which is there and not empty; expected a folder that is new or empty")


def find_weights(options: ExportOptions, config: RunConfig) -> TrainedWeights:
    """The checkpoint that --step names; for "last" of a run without checkpoints what it left as its result.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    run_folder = options.run_folder
    if not checkpoint_folders(run_folder):
        if options.step == LAST:
            return _result(run_folder, config)
        raise ValueError(f"--step is {options.step}, but {run_folder} holds no checkpoints; expected --step {LAST}")
    found = find_step(run_folder, options.step, config)
    assert found.checkpoint is not None
    recorded = found.checkpoint.state.get("adapter_fingerprint", "")
    return TrainedWeights(
        folder=found.checkpoint.folder,
        step=found.checkpoint.step,
        fingerprint="" if is_of_bytes(recorded) else recorded,
        origin=f"{found.checkpoint.folder}, every file as its manifest says",
        warnings=found.passed_over,
    )


def _result(run_folder: Path, config: RunConfig) -> TrainedWeights:
    name = "model" if config.training.parameters == FULL else "adapter"
    metrics = run_folder / "metrics.jsonl"
    if not (run_folder / name).is_dir() or not metrics.is_file():
        raise ValueError(
            f"{run_folder} holds neither checkpoints nor {name}/ with metrics.jsonl; expected the folder of a run that "
            "has written one"
        )
    steps = [line["step"] for line in read_metrics(metrics, "train")]
    return TrainedWeights(
        folder=run_folder,
        step=max(steps, default=0),
        fingerprint="",
        origin=f"{run_folder / name}, the run's result",
        warnings=("no checkpoint is there, so nothing says whether the result's bytes are those that were written",),
    )


def _check(given: argparse.Namespace, config: RunConfig) -> None:
    for name, (choices, _) in _CHOICES.items():
        value = getattr(given, name)
        if value is not None:
            check_choice(f"--{name}", value, choices)
    is_full, dtype = config.training.parameters == FULL, given.dtype or config.model.dtype
    if is_full and given.format == ADAPTER:
        raise ValueError("--format is adapter, but the run trained all weights; expected --format merged")
    if is_full and (given.base or given.rounding == STOCHASTIC):
        option = f"--base is {given.base}" if given.base else "--rounding is stochastic"
        raise ValueError(
            f"{option}, but the run trained all weights: there is no base beside them, and the policy is their "
            f"rounding to nearest; expected no --{option[2:].split()[0]}"
        )
    if given.format == ADAPTER:
        for name in ("dtype", "rounding", "base"):
            if getattr(given, name) is not None:
                raise ValueError(
                    f"--{name} is {getattr(given, name)}, but an adapter is written in float32, as it was trained, "
                    f"beside any base; expected no --{name}, or --format merged"
                )
    if given.rounding == STOCHASTIC and dtype == "float32":
        raise ValueError(
            "--rounding is stochastic, but float32 is written, which takes the sums as they are; expected --dtype "
            "bfloat16, or no --rounding"
        )


def command_line() -> CommandLine:
    line = CommandLine("export", USAGE, settings=f"{' and '.join(_OVERRIDES)} may follow: where the base lies now.")
    line.add_argument("--step", default=LAST, help="a step that was kept, last or best (default: last)")
    for name, (_, meaning) in _CHOICES.items():
        line.add_argument(f"--{name}", help=meaning)
    return line


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Path, Path, list[str]]:
    given, (run_folder, destination), overrides = command_line().split_places(
        arguments, "the folder of a run and a new folder", num_places=2
    )
    return given, run_folder, destination, overrides
