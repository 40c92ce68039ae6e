"""What `export` is asked for, and the weights of a run that it names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlbench.config.checks import check_choice
from rlbench.config.full_training import FULL
from rlbench.config.recorded import recorded_config
from rlbench.config.schema import RunConfig
from rlbench.tracking.jsonl import read_metrics

USAGE = (
    "python -m rlbench export RUN DEST [--step N|last|best] [--format merged|adapter] [--dtype bfloat16|float32] "
    "[--rounding nearest|stochastic] [--base trained|original] [model.path=...]"
)
MERGED, ADAPTER = "merged", "adapter"
NEAREST, STOCHASTIC = "nearest", "stochastic"
TRAINED, ORIGINAL = "trained", "original"
BEST, LAST = "best", "last"
_CHOICES = {
    "format": [MERGED, ADAPTER],
    "dtype": ["bfloat16", "float32"],
    "rounding": [NEAREST, STOCHASTIC],
    "base": [TRAINED, ORIGINAL],
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
    fingerprint: str  # as the run recorded it; "": it did not
    origin: str  # in words
    warnings: tuple[str, ...] = ()


def read_call(arguments: Sequence[str]) -> tuple[ExportOptions, RunConfig]:
    """The call and the run's config. Loads no torch.

    Raises:
        ValueError: anything a user can get wrong.
    """
    given, run_folder, destination, overrides = _parse(arguments)
    if (run_folder / "chain.json").is_file():
        stages = ", ".join(sorted(f.parent.name for f in run_folder.glob("*/config.yaml")))
        raise ValueError(f"{run_folder} is a chain of runs ({stages}); expected one of them, e.g. {run_folder}/1_...")
    for override in overrides:
        if override.partition("=")[0] not in _OVERRIDES:
            raise ValueError(
                f"export takes the settings of the run, so {override} is not read; expected none but "
                f"{' and '.join(_OVERRIDES)}, which say where the base lies"
            )
    config = recorded_config(run_folder, overrides)
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
    from rlbench.training.checkpoint import find_checkpoint, read_checkpoint

    run_folder = options.run_folder
    folders = {int(f.name.removeprefix("step-")): f for f in sorted((run_folder / "checkpoints").glob("step-*"))}
    if options.step == LAST and not folders:
        return _result(run_folder, config)
    if not folders:
        raise ValueError(f"--step is {options.step}, but {run_folder} holds no checkpoints; expected --step last")
    if options.step == LAST:
        checkpoint, damaged = find_checkpoint(run_folder)
    else:
        step = int(options.step) if options.step != BEST else _best_step(find_checkpoint(run_folder)[0].state, config)
        if step not in folders:
            kept = ", ".join(map(str, folders))
            raise ValueError(
                f"--step is {options.step}, but the checkpoint of step {step} was not kept; expected one of {kept}, "
                "last or best"
            )
        checkpoint, damaged = read_checkpoint(folders[step]), []
    return TrainedWeights(
        folder=checkpoint.folder,
        step=checkpoint.step,
        fingerprint=checkpoint.state.get("adapter_fingerprint", ""),
        origin=f"{checkpoint.folder}, every file as its manifest says",
        warnings=tuple(f"passed over: {line}" for line in damaged),
    )


def _best_step(state: Mapping[str, Any], config: RunConfig) -> int:
    """Of all evaluations until the newest checkpoint, the first of equals."""
    key = config.checkpoint.keep_best
    found = [(e["step"], e["metrics"][key]) for e in state["evaluations"] if key in e["metrics"]]
    if not key or not found:
        raise ValueError(
            f"--step is best, but the run has checkpoint.keep_best={key or 'null'} and {len(found)} evaluations of it; "
            "expected --step N or last"
        )
    sign = -1.0 if key.endswith("loss") else 1.0
    step, value = max(found, key=lambda pair: sign * pair[1])
    if not step:
        raise ValueError(f"--step is best, but {key} was best before training ({value:.4g}); expected --step N or last")
    return step


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
    for name, choices in _CHOICES.items():
        value = getattr(given, name)
        if value is not None:
            check_choice(f"--{name}", value, choices)
    if given.step not in (LAST, BEST) and not given.step.isdigit():
        raise ValueError(f"--step is {given.step}, expected a number, last or best")
    if config.stage == "reward_model":
        raise ValueError(
            "the run's stage is reward_model: its result is an adapter with a head for scores, no language model; "
            "expected a run that trains a policy (an online run reads a reward model from RUN itself)"
        )
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


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Path, Path, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--step", default=LAST)
    for name in _CHOICES:
        parser.add_argument(f"--{name}")
    try:
        given, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}; expected: {USAGE}") from error
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        raise ValueError(f"export has no option {unknown[0]}; expected: {USAGE}")
    if len(rest) < 2 or any("=" in place for place in rest[:2]):
        raise ValueError(f"export needs the folder of a run and a new folder; expected: {USAGE}")
    return given, Path(rest[0]).expanduser(), Path(rest[1]).expanduser(), rest[2:]
