"""Checkpoints: complete or absent, checked before use.

A checkpoint is written to a temporary folder, every file and the folder are fsynced, then it is renamed. Its manifest
lists size and SHA-256 of every file; a reader trusts nothing else.

    checkpoints/step-000010/adapter/            PEFT format, float32; with training.parameters=full model/ in its place
                            optimizer.safetensors
                            critic/             adapter/ with value_head.safetensors, optimizer; with a critic
                            reference/          adapter/; with a reference that is refreshed
                            state.json          step, policy_version, stream, config, versions, git revision, ...
                            manifest.json
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlbench.models.model_folder import share_mode
from rlbench.models.policy import Policy
from rlbench.tracking.errors import TrackingError
from rlbench.tracking.jsonl import fsync_folder
from rlbench.tracking.whole_file import bring_to_disk
from rlbench.training.optimizer_state import fill_state, state_tensors

_FORMAT = 1
_REPLACED = "replaced_checkpoints"  # beside checkpoints/: of steps that a run made again


class Trained(Protocol):
    """What has parameters and writes itself: the policy, a critic."""

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]: ...

    def save(self, folder: Path, base_name: str) -> None: ...

    def load(self, folder: Path) -> None: ...


Beside = Mapping[str, tuple[Trained, torch.optim.Optimizer | None]]  # by the name of their folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    folder: Path
    state: Mapping[str, Any]  # what `save_checkpoint` was given

    @property
    def step(self) -> int:
        return int(self.state["step"])


def save_checkpoint(
    run_folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    base_name: str,
    keep_last: int,
    keep_steps: Collection[int] = (),
    beside: Beside | None = None,
) -> Path:
    """Write `checkpoints/step-NNNNNN` and remove all but the newest `keep_last` and those of `keep_steps`.

    Args:
        run_folder: of the run.
        policy: what it trains is saved.
        optimizer: its per-parameter tensors are saved under the parameters' names.
        state: JSON-able; must hold "step".
        base_name: recorded in the adapter's config.
        keep_last: at least 1.
        keep_steps: steps whose checkpoints stay.
        beside: saved like the policy, each in a folder of its own: a critic, a reference.

    Raises:
        TrackingError: it could not be written; earlier checkpoints are untouched, no partial one is left.
    """
    final = run_folder / "checkpoints" / _name(state["step"])
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    aside = final.with_name(f".{final.name}.{os.getpid()}.before")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _save(temporary, policy, optimizer, base_name)
        for name, (trained, its_optimizer) in (beside or {}).items():
            (temporary / name).mkdir()
            _save(temporary / name, trained, its_optimizer, base_name)
        (temporary / "state.json").write_text(json.dumps(dict(state), indent=1))
        share_mode(temporary, "state.json")
        _write_manifest(temporary)
        if final.exists():  # the same step, saved before
            os.rename(final, aside)
        os.rename(temporary, final)
        fsync_folder(final.parent)
    except OSError as error:
        raise TrackingError.from_os_error("save a checkpoint to", final, error) from error
    except SafetensorError as error:  # its writer's way to say what OSError says: disk full
        raise TrackingError(f"cannot save a checkpoint to {final}: {error}") from error
    finally:
        if final.exists():
            _remove_leftovers(final.parent)
        shutil.rmtree(temporary, ignore_errors=True)
    kept = {_name(step) for step in keep_steps}
    for old in _folders(run_folder)[keep_last:]:
        if old.name not in kept:
            _remove(old)
    return final


def set_aside_later(run_folder: Path, step: int) -> list[str]:
    """Clear the way for a run that goes on from `step`: whole checkpoints of later steps are moved, others removed.

    Returns:
        What was done with each, the newest first, in words.
    """
    found = []
    for folder in _folders(run_folder):
        if _step_of(folder) <= step:
            continue
        try:
            read_checkpoint(folder)
        except ValueError:
            _remove(folder)
            found.append(f"{folder.name} was damaged and is removed")
        else:
            found.append(f"{folder.name} is now {_move_aside(folder, run_folder / _REPLACED)}")
    return found


def _move_aside(folder: Path, place: Path) -> Path:
    place.mkdir(exist_ok=True)
    name = _name(_step_of(folder))
    free = (place / (name if number == 1 else f"{name}-{number}") for number in count(1))
    target = next(path for path in free if not path.exists())
    os.rename(folder, target)
    return target


def _step_of(folder: Path) -> int:
    """-1 of a folder with another name."""
    found = re.fullmatch(r"\.?step-(\d+)(?:\.before)?", folder.name)
    return int(found[1]) if found else -1


def _remove(folder: Path) -> None:
    """At once for readers, whenever the process ends."""
    with suppress(OSError):  # what cannot be removed stays
        gone = folder.with_name(f".{folder.name.lstrip('.')}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _remove_leftovers(place: Path) -> None:
    """What processes left that were killed while they wrote or removed a checkpoint."""
    for folder in place.glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def has_checkpoint(run_folder: Path) -> bool:
    """Whether the run has written one, valid or not."""
    return bool(_folders(run_folder))


def find_checkpoint(place: Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint at `place`, or the newest valid one if `place` is a run's folder.

    Returns:
        The checkpoint and one line for each newer one that was damaged and passed over.

    Raises:
        ValueError: there is none, or the one that was named is damaged.
    """
    if (place / "manifest.json").is_file():
        return read_checkpoint(place), []
    damaged: list[str] = []
    for folder in _folders(place):
        try:
            return read_checkpoint(folder), damaged
        except ValueError as error:
            damaged.append(str(error))
    detail = f": {'; '.join(damaged)}" if damaged else ""
    raise ValueError(
        f"resume is {place}, but no valid checkpoint is there{detail}; expected a run's folder or a checkpoint"
    )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check every file against the manifest, then read the state.

    Raises:
        ValueError: a file is missing or differs; it is named.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} has no readable manifest.json ({error})") from error
    if manifest.get("format") != _FORMAT:
        raise ValueError(f"{folder} has checkpoint format {manifest.get('format')}, expected {_FORMAT}")
    for name, expected in files.items():
        file = folder / name
        actual = _describe(file) if file.is_file() else None
        if actual != expected:
            raise ValueError(f"{folder} is damaged: {name} is {actual or 'missing'}, expected {expected}")
    return Checkpoint(folder=folder, state=json.loads((folder / "state.json").read_text()))


def restore(
    checkpoint: Checkpoint, policy: Policy, optimizer: torch.optim.Optimizer, beside: Beside | None = None
) -> None:
    """Put adapter and optimizer back, bit for bit, and those of `beside`.

    Raises:
        ValueError: the checkpoint's tensors do not fit this policy.
    """
    _load(checkpoint.folder, policy, optimizer)
    for name, (trained, its_optimizer) in (beside or {}).items():
        if not (checkpoint.folder / name).is_dir():
            raise ValueError(
                f"{checkpoint.folder} has no {name}; expected a checkpoint of a run with equal algorithm.*"
            )
        _load(checkpoint.folder / name, trained, its_optimizer)


def _save(folder: Path, trained: Trained, optimizer: torch.optim.Optimizer | None, base_name: str) -> None:
    trained.save(folder, base_name)
    if optimizer is not None:
        save_file(state_tensors(trained.named_parameters(), optimizer), str(folder / "optimizer.safetensors"))


def _load(folder: Path, trained: Trained, optimizer: torch.optim.Optimizer | None) -> None:
    trained.load(folder)
    if optimizer is None:
        return
    fill_state(trained.named_parameters(), optimizer, load_file(str(folder / "optimizer.safetensors")))


def _folders(run_folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; one that was set aside counts if what replaces it never got its name.

    A step from 1,000,000 on has a longer name than those before.
    """
    place = run_folder / "checkpoints"
    found = {folder.name: folder for folder in place.glob("step-*")}
    for aside in place.glob(".step-*.before"):
        found.setdefault(aside.name.split(".")[1], aside)
    return [found[name] for name in sorted(found, key=lambda name: (len(name), name), reverse=True)]


def _write_manifest(folder: Path) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    described = {str(file.relative_to(folder)): _describe(file) for file in files}
    (folder / "manifest.json").write_text(json.dumps({"format": _FORMAT, "files": described}, indent=1))
    bring_to_disk(folder)


def _describe(file: Path) -> str:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return f"{file.stat().st_size} bytes, sha256 {digest}"
