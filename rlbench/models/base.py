"""The frozen base model: loaded once, seen through several module trees that share its tensors."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlbench.models.quiet import no_progress_bars

ModelT = TypeVar("ModelT", bound=nn.Module)


def load_base(path: str, *, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """Load a causal language model from a local folder (safetensors), frozen and in evaluation mode.

    Args:
        path: folder with config.json and weights; see `rlbench.models.source` for hub ids and GGUF files.
        dtype: of all weights.
        device: where the weights go.

    Raises:
        ValueError: if the folder holds no model that transformers can load.
    """
    try:
        with no_progress_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model.path: {path} does not load as a causal language model ({error})") from error
    return model.to(device=device).requires_grad_(False).eval()


def share_base(model: ModelT) -> ModelT:
    """A second module tree over the same parameter tensors: no weight byte is copied.

    Modules, buffers and the config are copied, so that one tree can get other attention, adapters or patches than
    the other.
    """
    shared: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared)


def storage_bytes(*models: nn.Module) -> int:
    """Bytes of the distinct parameter storages behind the models."""
    storages: dict[int, int] = {}
    for model in models:
        for parameter in model.parameters():
            storage = parameter.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def output_weight(model: PreTrainedModel) -> Tensor:
    """Weight [V, D] of the language-model head."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head.weight
