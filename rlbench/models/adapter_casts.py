"""All adapters of a patched model cast to the compute dtype together, once a forward pass.

Alone, the casts of a decoder layer are two dozen launches, a third of all of its forward pass; a GPU that waits for
launches, as with small models and short microbatches, waits for them. Each forward pass gets new tensors: those of an
earlier one, which a backward pass may still need, stay as they were.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rlbench.models.patch import KernelAttention, KernelMlp, projection
from rlbench_kernels import Adapters, Lora, ScaledCopies

_ALIGNMENT = 64  # numbers: tensors begin at multiples of 128 bytes


@dataclass(frozen=True, slots=True)
class _Group:
    """Projections of one input."""

    module: Any
    name: str  # of the module's attribute that takes the `Adapters`
    loras: tuple[Lora | None, ...]


class AdapterCasts:
    def __init__(self, tree: nn.Module, dtype: torch.dtype) -> None:
        """
        Args:
            tree: patched, adapters on.
            dtype: of the computation.
        """
        self._groups = [group for module in tree.modules() for group in _groups(module)]
        self._dtype = dtype
        self._shapes = [shape for group in self._groups for shape in _shapes(group)]
        sizes = [-(-prod(shape) // _ALIGNMENT) * _ALIGNMENT for shape in self._shapes]
        self._starts = [0, *accumulate(sizes)]
        self._scalings: list[float] = []
        self._copies: ScaledCopies | None = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast what the parameters hold now."""
        if not self._groups:
            return
        loras = [lora for group in self._groups for lora in group.loras if lora is not None]
        room = torch.empty(self._starts[-1], dtype=self._dtype, device=loras[0].a.device)
        targets = self._place(room)
        scalings = [lora.scaling for lora in loras]
        if self._copies is None or scalings != self._scalings:
            self._scalings = scalings
            self._copies = ScaledCopies(targets, [1.0] * len(loras) + scalings, room)
        self._copies([lora.a for lora in loras] + [lora.b for lora in loras], room)

    def _place(self, room: Tensor) -> list[Tensor]:
        """Hand every module its tensors in `room`, still to be filled; returns all A, then all B."""
        tensors = iter([
            room.as_strided(shape, (shape[1], 1), start)
            for shape, start in zip(self._shapes, self._starts, strict=False)
        ])  # fmt: skip
        all_a: list[Tensor] = []
        all_b: list[Tensor] = []
        for group in self._groups:
            stacked = next(tensors)
            of_b = [None if lora is None else next(tensors) for lora in group.loras]
            all_a += stacked.split([len(lora.a) for lora in group.loras if lora is not None])
            all_b += [b for b in of_b if b is not None]
            setattr(group.module, group.name, Adapters(stacked, tuple(of_b)))
        return all_a + all_b


def cast_together(tree: nn.Module, dtype: torch.dtype) -> None:
    """Let each forward pass of `tree` begin with the casts of all its adapters; nothing if there is nothing to cast."""
    if any(p.requires_grad and p.dtype != dtype for p in tree.parameters()):
        casts = AdapterCasts(tree, dtype)
        tree.base_model.register_forward_pre_hook(lambda *_: casts.refresh())  # type: ignore[union-attr]


def _groups(module: nn.Module) -> list[_Group]:
    parts: list[tuple[str, list[Any]]] = []
    if isinstance(module, KernelAttention):
        parts = [("qkv_cast", [module.q_proj, module.k_proj, module.v_proj]), ("o_cast", [module.o_proj])]
    elif isinstance(module, KernelMlp):
        parts = [("inner_cast", [module.gate_proj, module.up_proj]), ("down_cast", [module.down_proj])]
    groups = [_Group(module, name, tuple(projection(layer)[1] for layer in layers)) for name, layers in parts]
    return [group for group in groups if any(group.loras)]


def _shapes(group: _Group) -> list[tuple[int, int]]:
    """Of the stacked A, and of each B."""
    present = [lora for lora in group.loras if lora is not None]
    stacked = (sum(len(lora.a) for lora in present), present[0].a.shape[1])
    return [stacked, *((lora.b.shape[0], lora.b.shape[1]) for lora in present)]
