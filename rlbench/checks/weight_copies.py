"""Bit-exact checks of weights: the engine's adapter is the trainer's, and no base weight changes during a run.

They catch what logprobs cannot show yet: after the first steps a missing layer moves them by less than bf16 rounds.

Shapes: R rank of the trainer's adapter, S rank of the engine's buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlbench.models.adapter import Adapter
from rlbench.models.word_sums import word_sum


def differing_layers(held: Adapter, trained: Adapter) -> list[str]:
    """Layers whose weights in the engine are not what a sync of `trained` would have written, sorted.

    Args:
        held: from `Engine.held_adapter`, any float dtype, ranks S >= R padded with zeros.
        trained: the trainer's adapter, float32.
    """
    names = sorted(set(held.lora_a) | set(trained.lora_a))
    return [name for name in names if not _is_same(held, trained, name)]


def explain(held: Adapter, trained: Adapter, layers: Sequence[str]) -> str:
    """What is wrong with the engine's adapter in `layers`, in words."""
    present = [name for name in layers if name in held.lora_a and name in trained.lora_a]
    where = f"{len(layers)} of {len(trained.lora_a)} layers, the first is {layers[0]}"
    if not present or all(not held.lora_b[name].any() for name in present):
        return f"the engine holds no adapter (zeros) in {where}"
    unscaled = Adapter(lora_a=trained.lora_a, lora_b=trained.lora_b, scaling=1.0)
    if trained.scaling != 1 and all(_is_same(held, unscaled, name) for name in present):
        return f"the scaling of {trained.scaling:g} (lora.alpha) was not folded into B in {where}"
    return f"the engine holds other values in {where}"


def signature(tensors: Mapping[str, Tensor]) -> list[int]:
    """One number a tensor, in the order of the names: the sum of its bytes as 64-bit words, modulo 2**64.

    A change of one weight always changes it; words that only swap places do not.
    """
    sums = [word_sum(tensors[name]) for name in sorted(tensors)]
    return torch.stack(sums).tolist() if sums else []


class BaseGuard:
    """Notices a base weight that was overwritten, in the engine or in the trainer."""

    def __init__(self, engine_tensors: Mapping[str, Tensor], trainer_tensors: Mapping[str, Tensor]) -> None:
        """
        Args:
            engine_tensors: live base weights of the engine by name.
            trainer_tensors: live base weights of the trainer; those that it shares with the engine are read once.
        """
        shared = {_place(t) for t in engine_tensors.values()} & {_place(t) for t in trainer_tensors.values()}
        self._tensors = {
            f"{'shared' if _place(tensor) in shared else 'engine'} {name}": tensor
            for name, tensor in engine_tensors.items()
        } | {f"trainer {name}": tensor for name, tensor in trainer_tensors.items() if _place(tensor) not in shared}
        self._expected = signature(self._tensors)

    def changed(self) -> list[str]:
        """ "engine NAME", "trainer NAME" or "shared NAME" of each weight that is not what it was, sorted."""
        found = signature(self._tensors)
        names = sorted(self._tensors)
        return [n for n, a, b in zip(names, found, self._expected, strict=True) if a != b]


def _is_same(held: Adapter, trained: Adapter, name: str) -> bool:
    if name not in trained.lora_a:
        return not held.lora_b[name].any()
    if name not in held.lora_a:
        return False
    held_a, held_b = held.lora_a[name], held.lora_b[name]  # [S, in], [out, S]
    lora_a, lora_b = trained.lora_a[name].detach(), trained.lora_b[name].detach()  # [R, in], [out, R]
    rank = len(lora_a)
    return (
        torch.equal(held_a[:rank], lora_a.to(held_a))
        and torch.equal(held_b[:, :rank], (lora_b * trained.scaling).to(held_b))
        and (len(held_a) == rank or not held_b[:, rank:].any())
    )


def _place(tensor: Tensor) -> int:
    """Equal for views of one memory: the trainer may hold rows of what the engine holds fused."""
    return tensor.untyped_storage().data_ptr()
