"""The command that goes on with a run, to be copied into a shell."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path


def resume_command(folder: Path, overrides: Sequence[str], changes: Mapping[str, object] | None = None) -> str:
    """The run's own overrides with `resume=folder`: without them it would be refused, or go on with other settings.

    Args:
        folder: of the run or the chain.
        overrides: those that it was started with, as Hydra holds them.
        changes: settings that replace the run's.

    Example:
        resume_command(Path("outputs/a/1"), ["+exp=grpo_gsm8k", "seed=2"], {"training.num_steps": 48})
    """
    added = {"resume": folder, **(changes or {})}
    kept = [override for override in overrides if override.lstrip("+").partition("=")[0] not in added]
    return shlex.join(["python", "-m", "rlbench", *kept, *(f"{key}={value}" for key, value in added.items())])


def own_overrides() -> list[str]:
    """Of this run, in a sweep too; none if it was not started by a command line."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
