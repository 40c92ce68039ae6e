"""A frozen linear layer whose weight stays in NF4 and is made dense for the moment of each matmul."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from rlbench_kernels import Nf4Weight, dequantize_nf4


class Nf4Linear(nn.Linear):
    """`y = x W^T + b` over NF4 bytes that belong to someone else (the engine, or a checkpoint).

    `weight` holds the packed bytes, uint8 [out * in / 2, 1], in bitsandbytes' layout. It never changes: copies of the
    layer, `copy.deepcopy` included, use the same bytes and scales.

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """

    def __init__(self, packed: Tensor, quant_state: Any, bias: Tensor | None) -> None:
        """
        Args:
            packed: uint8 [out * in / 2, 1].
            quant_state: bitsandbytes' QuantState of these rows; its shape is (out, in), its dtype that of the result.
            bias: [out] or None.
        """
        nn.Module.__init__(self)
        self.out_features, self.in_features = quant_state.shape
        if packed.numel() * 2 != self.out_features * self.in_features:
            raise ValueError(
                f"NF4 weight of {packed.numel()} bytes, expected {self.out_features * self.in_features // 2} for "
                f"[{self.out_features}, {self.in_features}]"
            )
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.quant_state = quant_state
        self.nf4 = Nf4Weight.from_quant_state(packed, quant_state)  # the same bytes, for the kernels

    def __deepcopy__(self, memo: dict[int, Any]) -> Nf4Linear:
        copied = Nf4Linear(self.weight.data, self.quant_state, None if self.bias is None else self.bias.data)
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
