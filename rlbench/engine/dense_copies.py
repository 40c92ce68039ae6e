"""Dense copies of an engine's NF4 matrices, for as long as it generates.

bitsandbytes makes a matrix dense again at every matmul of a batch: at each token that is decoded the whole base is
written and read once more in 16 bits. A copy that lasts costs that once a generation phase. It has the same values, so
nothing else changes; and it lies in memory that the engine gives back while it sleeps.

Nothing here imports vllm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlbench.models.shared_base import EngineWeight
from rlbench_kernels import Nf4Weight, dequantize_nf4

DEQUANTIZE = "rlbench_dequantize"  # of vLLM's additional_config, and so of the key of what it compiled
_COPY = "rlbench_dense"  # buffer of a layer


class DenseMethod:
    """Stands in for the quantisation method of a linear layer of vLLM's that has a copy."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b: x [.., in], b [out], result [.., out] in x's dtype."""
        return F.linear(x, getattr(layer, _COPY), bias)


class DenseCopies:
    """Copies of all NF4 matrices of an engine's model, in one block of memory.

    Attributes:
        num_bytes: of that block.

    Example:
        copies = DenseCopies(weights, torch.bfloat16)
        copies.fill()  # again whenever the memory was given back
    """

    def __init__(self, weights: Mapping[nn.Module, EngineWeight], dtype: torch.dtype) -> None:
        """Takes the memory, whose content is undefined until `fill`, and makes the layers compute with it.

        Args:
            weights: of every quantised linear layer of the model; fused matrices lie one below the other.
            dtype: of activations.

        Raises:
            ValueError: no layer is quantised.
        """
        if not weights:
            raise ValueError("engine.dequantize is true, but the engine's model has no NF4 matrix; expected false")
        self._parts: list[tuple[Nf4Weight, Tensor]] = []
        shapes = {layer: _shape(weight) for layer, weight in weights.items()}
        sizes = {layer: rows * columns for layer, (rows, columns) in shapes.items()}
        device = next(iter(weights.values())).tensor.device
        block = torch.empty(sum(sizes.values()), dtype=dtype, device=device)
        self.num_bytes = block.nbytes
        start = 0
        for layer, weight in weights.items():
            copy = block[start : start + sizes[layer]].view(shapes[layer])
            start += sizes[layer]
            layer.register_buffer(_COPY, copy, persistent=False)
            layer.quant_method = DenseMethod()  # pyright: ignore[reportArgumentType]
            row = 0
            for packed, state in weight.nf4_parts:
                self._parts.append((Nf4Weight.from_quant_state(packed, state), copy[row : row + state.shape[0]]))
                row += state.shape[0]

    @torch.no_grad()
    def fill(self) -> None:
        """Dequantise all matrices into the copies, with bitsandbytes' bits."""
        for weight, copy in self._parts:
            dequantize_nf4(weight, out=copy)


def _shape(weight: EngineWeight) -> tuple[int, int]:
    rows = sum(state.shape[0] for _, state in weight.nf4_parts)
    return rows, weight.nf4_parts[0][1].shape[1]
