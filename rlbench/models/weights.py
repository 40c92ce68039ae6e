"""All weights of a model as a record: what a trainer of every parameter hands to an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlbench.models.fingerprint import fingerprint_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Live tensors by the names of a transformers model's parameters; a tied head is no entry of its own.

    Example:
        Weights(tensors={"model.embed_tokens.weight": torch.zeros(98, 64), "model.norm.weight": torch.ones(64)})
    """

    tensors: Mapping[str, Tensor]

    def fingerprint(self) -> str:
        """See `fingerprint_of`."""
        return fingerprint_of(self.tensors)


def check_weights(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Whether weights are those of a model.

    Args:
        weights: to be copied.
        shapes: of every parameter of the model, by name.

    Raises:
        ValueError: a name is missing or unknown, or a shape does not fit.
    """
    names, own = set(weights.tensors), set(shapes)
    if names != own:
        name = min(names ^ own)
        where = "unknown to the engine's model" if name in names else "missing"
        raise ValueError(f"weights: {name} and {len(names ^ own) - 1} more are {where}; expected the same model")
    for name, shape in shapes.items():
        if tuple(weights.tensors[name].shape) != tuple(shape):
            found = tuple(weights.tensors[name].shape)
            raise ValueError(f"weights: {name} has shape {found}, the engine's model has {tuple(shape)}")


@torch.no_grad()
def copy_weights(weights: Weights, own: Mapping[str, Tensor]) -> int:
    """Copy into `own` in place, which may be on another device; returns how many tensors were copied.

    Tensors that are the same memory already stay as they are.
    """
    pairs = [
        (tensor, weights.tensors[name]) for name, tensor in own.items() if not is_same_memory(tensor, weights, name)
    ]
    for tensor, source in pairs:
        tensor.copy_(source)
    return len(pairs)


def is_same_memory(tensor: Tensor, weights: Weights, name: str) -> bool:
    """Whether `tensor` is the very memory of the weights' tensor `name`."""
    other = weights.tensors[name]
    return tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape and tensor.numel() > 0
