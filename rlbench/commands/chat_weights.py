"""The weights of a step of a run: its checkpoint found by name, its tensors read, their fingerprint checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlbench.config.full_training import FULL
from rlbench.config.schema import RunConfig

if TYPE_CHECKING:
    from rlbench.models.adapter import Adapter
    from rlbench.models.weights import Weights
    from rlbench.training.checkpoint import Checkpoint

LAST, BEST, BASE = "last", "best", "base"
NAMES = f"a step, {LAST}, {BEST} or {BASE}"
_PREFIX, _LORA_A, _LORA_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a name such as "best" stands for.

    Example:
        Found(checkpoint=None)  # the base
    """

    checkpoint: Checkpoint | None  # None: the base without adapter
    passed_over: tuple[str, ...] = ()  # newer checkpoints that are damaged, a line each

    @property
    def label(self) -> str:
        return BASE if self.checkpoint is None else f"step {self.checkpoint.step}"


def find_step(run_folder: Path, name: str, config: RunConfig, said_by: str = "--step") -> Found:
    """The checkpoint that `name` stands for, every file of it checked.

    Args:
        run_folder: of the run.
        name: a step, "last" (the newest valid checkpoint), "best" (of checkpoint.keep_best) or "base".
        config: of the run.
        said_by: option or command that gave the name, for errors.

    Raises:
        ValueError: no such step was kept, or its checkpoint is damaged.
    """
    from rlbench.training.checkpoint import read_checkpoint

    if name == BASE:
        return Found(checkpoint=None)
    if name == LAST:
        return _newest(run_folder, said_by)
    said = f"{said_by} is {name or 'nothing'}"
    if name == BEST:
        step = _best_step(_newest(run_folder, said_by).checkpoint, config, said)
        said = f"{said}, which is step {step}"
    elif name.isascii() and name.isdigit():
        step = int(name)
    else:
        raise ValueError(f"{said}, expected {NAMES}")
    kept = {int(folder.name.removeprefix("step-")): folder for folder in _folders(run_folder)}
    if step not in kept:
        raise ValueError(
            f"{said}, of which no checkpoint was kept (there are: {', '.join(map(str, sorted(kept))) or 'none'}); "
            f"expected one of them, {LAST}, {BEST} or {BASE} (checkpoint.every_steps and checkpoint.keep_last decide)"
        )
    return Found(checkpoint=read_checkpoint(kept[step]))


def read_weights_of(checkpoint: Checkpoint, config: RunConfig, device: str) -> Adapter | Weights:
    """The tensors of a checkpoint as an engine takes them.

    Args:
        checkpoint: of the run.
        config: of the run, derived.
        device: of all weights, "cpu" or "cuda"; an adapter stays on the host.

    Raises:
        ValueError: their fingerprint is not the one that the run recorded, or they cannot be read.
    """
    if config.training.parameters == FULL:
        import torch

        from rlbench.models.full_policy import MODEL_FOLDER
        from rlbench.models.model_folder import read_weights
        from rlbench.models.weights import Weights

        saved, place = read_weights(checkpoint.folder / MODEL_FOLDER), {"dtype": getattr(torch, config.model.dtype)}
        weights = Weights(tensors={name: t.to(device=device, **place) for name, t in saved.items()})
    else:
        weights = _read_adapter(checkpoint.folder / "adapter")
    recorded, found = checkpoint.state["adapter_fingerprint"], weights.fingerprint()
    if found != recorded and _is_comparable(checkpoint, config):
        raise ValueError(
            f"the weights in {checkpoint.folder} have fingerprint {found}, but the run recorded {recorded} for step "
            f"{checkpoint.step}; expected the checkpoint as the run wrote it, and its lora.* settings"
        )
    return weights


def without_adapter(adapter: Adapter) -> Adapter:
    """A float32 adapter of the same shapes that adds nothing: an engine with it computes as its base alone."""
    import torch

    return replace(
        adapter,
        lora_a={name: a.float() for name, a in adapter.lora_a.items()},
        lora_b={name: torch.zeros_like(b, dtype=torch.float32) for name, b in adapter.lora_b.items()},
    )


def _is_comparable(checkpoint: Checkpoint, config: RunConfig) -> bool:
    """Of all weights a fingerprint depends on their dtype, and on a GPU it is another one than on a CPU."""
    recorded: Any = checkpoint.state["config"]
    is_same_place = recorded["hardware"]["profile"] == config.hardware.profile
    is_same_dtype = recorded["model"]["dtype"] == config.model.dtype
    return config.training.parameters != FULL or (is_same_place and is_same_dtype)


def _read_adapter(folder: Path) -> Adapter:
    """A PEFT folder as the record that engines take; names and scaling as the trainer exports them."""
    from safetensors.torch import load_file

    from rlbench.models.adapter import Adapter

    saved = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    parts = {
        suffix: {
            name.removeprefix(_PREFIX).removesuffix(suffix): t for name, t in tensors.items() if name.endswith(suffix)
        }
        for suffix in (_LORA_A, _LORA_B)
    }
    rank = math.sqrt(saved["r"]) if saved["use_rslora"] else saved["r"]
    return Adapter(lora_a=parts[_LORA_A], lora_b=parts[_LORA_B], scaling=saved["lora_alpha"] / rank)


def _newest(run_folder: Path, said_by: str) -> Found:
    from rlbench.training.checkpoint import read_checkpoint

    damaged: list[str] = []
    for folder in reversed(_folders(run_folder)):
        try:
            return Found(checkpoint=read_checkpoint(folder), passed_over=tuple(damaged))
        except ValueError as error:
            damaged.append(str(error))
    detail = f": {'; '.join(damaged)}" if damaged else ""
    raise ValueError(
        f"{run_folder} has no valid checkpoint{detail}; expected a run that saved one (checkpoint.every_steps), or "
        f"{said_by} {BASE}"
    )


def _folders(run_folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(f for f in (run_folder / "checkpoints").glob("step-*") if f.name.removeprefix("step-").isdigit())


def _best_step(newest: Checkpoint | None, config: RunConfig, said: str) -> int:
    """Of the evaluation with the best checkpoint.keep_best, the first of equals, as the run chose it."""
    assert newest is not None
    key, evaluations = config.checkpoint.keep_best, newest.state["evaluations"]
    known = sorted({name for evaluation in evaluations for name in evaluation["metrics"]})
    if key is None:
        raise ValueError(
            f"{said}, but checkpoint.keep_best is null, so no step is the best; expected a step, {LAST} or {BASE}, or "
            f"checkpoint.keep_best as one of: {', '.join(known) or 'none, the run made no evaluation'}"
        )
    if key not in known:
        raise ValueError(f"{said} of checkpoint.keep_best={key}, expected one of: {', '.join(known) or 'none'}")
    sign = -1.0 if key.endswith("loss") else 1.0
    best = max((e for e in evaluations if key in e["metrics"]), key=lambda e: sign * e["metrics"][key])
    if not best["step"]:
        raise ValueError(f"{said}, but the best {key} was that before the first step; expected {BASE}, or a step")
    return int(best["step"])
