"""A frozen linear layer whose weight stays in FP8 and is made dense for the moment of each matmul."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlbench_kernels import FP8, Fp8Weight, dequantize_fp8


class Fp8Linear(nn.Linear):
    """`y = x W^T + b` over FP8 codes that may belong to someone else (the engine).

    `weight` holds the codes as bytes, uint8 [out, in]: as floating numbers PEFT would give its adapters their dtype. It
    never changes: copies of the layer, `copy.deepcopy` included, use the same bytes and scales.

    vLLM rounds the inputs of these layers to FP8 too. That is left out here: inputs that differ by the bf16 rounding
    before it round to other codes, so a trainer that rounds as well is further from vLLM than one that does not
    (scripts/results/fp8_cpu.json), and its gradients would be those of another function.

    Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3.
    """

    def __init__(self, quantised: Fp8Weight, bias: Tensor | None) -> None:
        """
        Args:
            quantised: [out, in]; its dtype is that of inputs and results.
            bias: [out] or None.
        """
        nn.Module.__init__(self)
        self.out_features, self.in_features = quantised.shape
        self.compute_dtype = quantised.dtype
        self.weight = nn.Parameter(quantised.codes.view(torch.uint8), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scale = nn.Parameter(quantised.scale, requires_grad=False)  # float32 [out, 1]

    @property
    def fp8(self) -> Fp8Weight:
        """The same bytes, for the kernels."""
        return Fp8Weight(self.weight.data.view(FP8), self.scale.data, self.compute_dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Fp8Linear:
        copied = Fp8Linear(self.fp8, None if self.bias is None else self.bias.data)
        copied.weight, copied.scale, copied.bias = self.weight, self.scale, self.bias
        memo[id(self)] = copied
        return copied

    def dense_weight(self) -> Tensor:
        """[out, in] in `compute_dtype`, made anew at each call."""
        return dequantize_fp8(self.fp8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, fp8"
