"""Frozen linear layers with an engine's own copy of a LoRA update, several layers of one input fused into one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlbench.models.adapter import Adapter, check_adapter
from rlbench.models.fp8_linear import Fp8Linear
from rlbench_kernels import FP8, Fp8Weight, dequantize_fp8


class AdapterLinear(nn.Module):
    """`y = x W^T + b + (x A^T) (s B)^T`; inference only.

    Made of one linear layer or of several with the same input (q, k, v): their weights become rows of one matrix, and
    the layers' own parameters become views of it, so nothing is held twice. A stacks the parts' A matrices [sum R, in],
    B is block-diagonal [sum out, sum R]. An FP8 weight is made dense at each call.
    """

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = _fuse([part.weight for part in parts])  # [out, in]; FP8: its bytes
        scales = [part.scale for part in parts if isinstance(part, Fp8Linear)]
        self._scale = _fuse(scales) if scales else None  # FP8: float32 [out, 1]
        self.dtype = getattr(parts[0], "compute_dtype", self.weight.dtype)
        biases = [part.bias for part in parts]
        self.bias = None if any(bias is None for bias in biases) else _fuse(biases)
        ends = torch.tensor([part.weight.shape[0] for part in parts]).cumsum(0).tolist()
        self.rows = [slice(end - part.weight.shape[0], end) for end, part in zip(ends, parts, strict=True)]
        self._lora_a: Tensor | None = None  # [sum R, in]
        self._lora_b: Tensor | None = None  # [out, sum R], scaling folded in
        self._columns: list[slice | None] = []  # of each part in sum R; None for a part without adapter
        self.use_adapter = True

    def load(self, parts: Sequence[tuple[Tensor, Tensor] | None], scaling: float) -> None:
        """Copy float32 (A [R, in], B [out_i, R]) of each part, None for a part without adapter.

        The scaling is folded into B before the cast to the layer's dtype, as the trainer does.
        """
        self._lora_a = self._lora_b = None
        self._columns = []
        if all(part is None for part in parts):
            return
        place = {"dtype": self.dtype, "device": self.weight.device}
        self._lora_a = torch.cat([part[0].detach() for part in parts if part is not None]).to(**place, copy=True)
        self._lora_b = torch.zeros(self.weight.shape[0], self._lora_a.shape[0], **place)
        column = 0
        for rows, part in zip(self.rows, parts, strict=True):
            if part is None:
                self._columns.append(None)
                continue
            self._columns.append(slice(column, column + part[1].shape[1]))
            self._lora_b[rows, self._columns[-1]] = (part[1].detach() * scaling).to(**place)
            column += part[1].shape[1]

    def held(self) -> list[tuple[Tensor, Tensor] | None]:
        """The live (A [R, in], s B [out_i, R]) of each part; None for a part without adapter."""
        if self._lora_a is None or self._lora_b is None:
            return [None] * len(self.rows)
        return [
            None if columns is None else (self._lora_a[columns], self._lora_b[rows, columns])
            for rows, columns in zip(self.rows, self._columns, strict=True)
        ]

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self._dense_weight(), self.bias)
        if self._lora_a is None or self._lora_b is None or not self.use_adapter:
            return y
        low_rank = F.linear(x.flatten(0, -2), self._lora_a)  # [N, sum R]
        y.view(-1, y.shape[-1]).addmm_(low_rank, self._lora_b.T)
        return y

    def _dense_weight(self) -> Tensor:
        """[out, in] in the layer's dtype."""
        if self._scale is None:
            return self.weight
        return dequantize_fp8(Fp8Weight(self.weight.view(FP8), self._scale, self.dtype))


def _fuse(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor with the parameters' rows one after the other; the parameters become views of it."""
    if len(parameters) == 1:
        return parameters[0].data
    fused = torch.cat([parameter.data for parameter in parameters])
    start = 0
    for parameter in parameters:
        end = start + parameter.shape[0]
        parameter.data = fused[start:end]
        start = end
    return fused


@dataclass(frozen=True, slots=True)
class Slot:
    """A fused layer and the module paths of its parts."""

    layer: AdapterLinear
    names: tuple[str, ...]


class AdapterSlots:
    """All adaptable linear layers of an engine, by module path inside the base model."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._slots = list(slots)

    def load(self, adapter: Adapter) -> None:
        """Copy all tensors of the adapter; layers that it does not name lose theirs.

        Raises:
            ValueError: if it names an unknown module or a shape does not fit; nothing is changed then.
        """
        check_adapter(adapter, self.shapes())
        for slot in self._slots:
            parts = [
                (adapter.lora_a[name], adapter.lora_b[name]) if name in adapter.lora_a else None for name in slot.names
            ]
            slot.layer.load(parts, adapter.scaling)

    def held(self) -> Adapter:
        """Live tensors in the layers' dtype, scaling folded into B."""
        parts = {n: p for slot in self._slots for n, p in zip(slot.names, slot.layer.held(), strict=True) if p}
        return Adapter(
            lora_a={name: a for name, (a, _) in parts.items()},
            lora_b={name: b for name, (_, b) in parts.items()},
            scaling=1.0,
        )

    def enable(self, use_adapter: bool) -> None:
        for slot in self._slots:
            slot.layer.use_adapter = use_adapter

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) by module path."""
        return {
            name: (rows.stop - rows.start, slot.layer.weight.shape[1])
            for slot in self._slots
            for name, rows in zip(slot.names, slot.layer.rows, strict=True)
        }
