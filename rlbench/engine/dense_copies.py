"""Copies in 16 bits of an engine's linear layers, for as long as it generates; the policy's adapter may be in them.

bitsandbytes makes a matrix dense again at every matmul of a batch: at each token that is decoded the whole base is
written and read once more in 16 bits. A copy that lasts costs that once a generation phase, and it lies in memory that
the engine gives back while it sleeps. With the adapter in the copy, decoding has no LoRA matmuls either: there the
small ones cost more than their arithmetic. Rounded to nearest, a young adapter would vanish in bfloat16, so it is
rounded stochastically (`rlbench_kernels.merge_lora_`): what is sampled from is the policy plus a rounding noise, which
the engine's logprobs contain, as they contain that of every bfloat16 matmul.

Nothing here imports vllm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlbench.models.shared_base import EngineWeight
from rlbench_kernels import Nf4Weight, dequantize_nf4, merge_lora_

DENSE_COPIES = "rlbench_dense_copies"  # of vLLM's additional_config, and so of the key of what it compiled
_COPY = "rlbench_dense"  # buffer of a layer


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer of the engine's, which may fuse several of the checkpoint.

    Attributes:
        layer: that computes.
        weight: of it; fused matrices lie one below the other.
        parts: (path in the checkpoint, rows) of each, in order.
        depth: in features.
    """

    layer: nn.Module
    weight: EngineWeight
    parts: tuple[tuple[str, int], ...]
    depth: int


class DenseMethod:
    """Stands in for the quantisation method of a linear layer of vLLM's that has a copy."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b: x [.., in], b [out], result [.., out] in x's dtype."""
        return F.linear(x, getattr(layer, _COPY), bias)


@dataclass(frozen=True, slots=True)
class _Part:
    """One matrix of the checkpoint: where it comes from, and its rows of a copy."""

    name: str
    base: Nf4Weight | Tensor
    copy: Tensor

    def write(self, out: Tensor) -> None:
        """The base's values; of NF4 bitsandbytes' bits."""
        if isinstance(self.base, Nf4Weight):
            dequantize_nf4(self.base, out=out)
        else:
            out.copy_(self.base)


class DenseCopies:
    """Copies of an engine's linear layers in one block of memory.

    Attributes:
        num_bytes: of that block.
        device, dtype: of it.
        shapes: (in_features, out_features) of every matrix, by its path in the checkpoint.

    Example:
        copies = DenseCopies(layers, torch.bfloat16)
        copies.fill()  # again whenever the memory was given back
    """

    def __init__(self, layers: Sequence[LinearLayer], dtype: torch.dtype) -> None:
        """Takes the memory, whose content is undefined until `fill`, and makes the layers compute with it.

        Args:
            layers: with a copy.
            dtype: of activations.

        Raises:
            ValueError: there is no layer.
        """
        if not layers:
            raise ValueError("engine.dense_copies is set, but the engine's model has nothing to copy; expected none")
        self._parts: list[_Part] = []
        sizes = [sum(rows for _, rows in layer.parts) * layer.depth for layer in layers]
        block = torch.empty(sum(sizes), dtype=dtype, device=layers[0].weight.tensor.device)
        self.num_bytes, self.device, self.dtype = block.nbytes, block.device, dtype
        for layer, place in zip(layers, block.split(sizes), strict=True):
            copy = place.view(-1, layer.depth)
            layer.layer.register_buffer(_COPY, copy, persistent=False)
            layer.layer.quant_method = DenseMethod()  # pyright: ignore[reportArgumentType]
            names, num_rows = zip(*layer.parts, strict=True)
            bases = _bases(layer.weight, num_rows)
            self._parts += map(_Part, names, bases, copy.split(num_rows))
        self.shapes = {part.name: (part.copy.shape[1], part.copy.shape[0]) for part in self._parts}

    @torch.no_grad()
    def fill(self, adapter: Mapping[str, tuple[Tensor, Tensor]] | None = None, seed: int = 0) -> None:
        """Write all copies.

        Args:
            adapter: (A [R, in], B [out, R] with its scaling) in the copies' dtype, by path; None: the base alone.
            seed: of the rounding, 0 to 2^32 - 1.
        """
        for index, part in enumerate(self._parts):
            _write(part, part.copy, adapter, _seed(seed, index))

    @torch.no_grad()
    def num_differing(self, adapter: Mapping[str, tuple[Tensor, Tensor]] | None = None, seed: int = 0) -> int:
        """How many matrices are not, bit for bit, what `fill` would write; 0 is the proof that all are."""
        room = torch.empty(max(part.copy.numel() for part in self._parts), dtype=self.dtype, device=self.device)
        bits = torch.int32 if self.dtype.itemsize == 4 else torch.int16
        differs = []
        for index, part in enumerate(self._parts):
            expected = room[: part.copy.numel()].view(part.copy.shape)
            _write(part, expected, adapter, _seed(seed, index))
            differs.append((expected.view(bits) != part.copy.view(bits)).any())
        return int(torch.stack(differs).sum())


def _write(part: _Part, out: Tensor, adapter: Mapping[str, tuple[Tensor, Tensor]] | None, seed: int) -> None:
    part.write(out)
    if adapter is not None and part.name in adapter:
        merge_lora_(out, *adapter[part.name], seed)


def _seed(seed: int, index: int) -> int:
    """Another one for each matrix, different in all bits."""
    return (seed + index * 0x9E3779B9) & 0xFFFFFFFF


def _bases(weight: EngineWeight, num_rows: Sequence[int]) -> list[Nf4Weight | Tensor]:
    if not weight.nf4_parts:
        return list(weight.tensor.split(list(num_rows)))
    return [Nf4Weight.from_quant_state(packed, state) for packed, state in weight.nf4_parts]
