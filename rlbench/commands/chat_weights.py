"""The weights of a checkpoint: its tensors read, their fingerprint checked."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlbench.commands.run_step import why_incomparable
from rlbench.config.full_training import FULL
from rlbench.config.schema import RunConfig

if TYPE_CHECKING:
    from rlbench.models.adapter import Adapter
    from rlbench.models.weights import Weights
    from rlbench.training.checkpoint import Checkpoint

_PREFIX, _LORA_A, _LORA_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


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
    recorded = checkpoint.state["adapter_fingerprint"]
    found = weights.fingerprint()
    if found != recorded and not why_incomparable(checkpoint, config):
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
