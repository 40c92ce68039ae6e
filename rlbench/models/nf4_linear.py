"""A frozen linear layer whose weight stays in NF4 and is made dense for the moment of each matmul."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from rlbench_kernels import Nf4Weight, dequantize_nf4, join_rows

_NEIGHBOURS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # of one input


class Nf4Linear(nn.Linear):
    """`y = x W^T + b` over NF4 bytes that belong to someone else (the engine, or a checkpoint).

    `weight` holds the packed bytes, uint8 [out * in / 2, 1], in bitsandbytes' layout. It never changes: copies of the
    layer, `copy.deepcopy` included, use the same bytes and scales.

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """

    def __init__(self, quantised: Nf4Weight, bias: Tensor | None) -> None:
        """
        Args:
            quantised: [out, in]; its dtype is that of the result.
            bias: [out] or None.
        """
        nn.Module.__init__(self)
        self.out_features, self.in_features = quantised.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.hold(quantised)

    def hold(self, quantised: Nf4Weight) -> None:
        """Take these bytes, of the same values, instead."""
        self.nf4 = quantised  # for the kernels
        self.weight = nn.Parameter(quantised.packed[:, None], requires_grad=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Nf4Linear:
        copied = Nf4Linear(self.nf4, None if self.bias is None else self.bias.data)
        copied.weight, copied.bias = self.weight, self.bias
        memo[id(self)] = copied
        return copied

    def dense_weight(self) -> Tensor:
        """[out, in] in the quantisation's compute dtype, made anew at each call."""
        return dequantize_nf4(self.nf4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, nf4"


def join_neighbours(model: nn.Module) -> None:
    """Make q, k and v, and gate and up, of each layer rows of one matrix where all are NF4: dense in one launch."""
    for module in list(model.modules()):
        for names in _NEIGHBOURS:
            layers = [getattr(module, name, None) for name in names]
            neighbours = [layer for layer in layers if isinstance(layer, Nf4Linear)]
            if len(neighbours) == len(names):
                for layer, rows in zip(neighbours, join_rows([n.nf4 for n in neighbours]), strict=True):
                    layer.hold(rows)
