"""All weights of a model as a record: what a trainer of every parameter hands to an engine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlbench.models.word_sums import placed_word_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Live tensors by the names of a transformers model's parameters; a tied head is no entry of its own.

    Example:
        Weights(tensors={"model.embed_tokens.weight": torch.zeros(98, 64), "model.norm.weight": torch.ones(64)})
    """

    tensors: Mapping[str, Tensor]

    def fingerprint(self, *, as_on_gpu: bool | None = None) -> str:
        """First 16 hex digits of the SHA-256 over names, dtypes, shapes and bytes, in sorted order.

        On a GPU sums of the bytes stand for them (`placed_word_sum`): to bring billions of weights to the host would
        take seconds each step. So equal weights have another fingerprint there than on a CPU.

        Args:
            as_on_gpu: compute the one of a GPU (True) or of a CPU (False) wherever the tensors lie, to compare with
                what was recorded there; None: the one of where they lie.
        """
        digest = hashlib.sha256()
        sums = []
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach()
            digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
            if tensor.device.type != "cpu" if as_on_gpu is None else as_on_gpu:
                sums.append(placed_word_sum(tensor))
            else:
                digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        if sums:
            digest.update(repr(torch.stack(sums).tolist()).encode())
        return digest.hexdigest()[:16]


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
