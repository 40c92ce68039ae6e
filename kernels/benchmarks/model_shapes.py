"""The shapes of the models that the benchmarks are run for, and the frozen matrices of one block."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class ModelShape(NamedTuple):
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int


MODELS = {
    "Llama-3.1-8B": ModelShape(4096, 32, 8, 128, 14336, 128256),
    "Qwen2.5-7B": ModelShape(3584, 28, 4, 128, 18944, 152064),
    "Qwen3-4B": ModelShape(2560, 32, 8, 128, 9728, 151936),
}
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def matrices(model: str, names: tuple[str, ...] = MATRICES) -> dict[str, Tensor]:
    """Random bf16 matrices [out, in] of the linear layers."""
    hidden, heads, kv_heads, dim, inner, _ = MODELS[model]
    shapes = {
        "q": (heads * dim, hidden), "k": (kv_heads * dim, hidden), "v": (kv_heads * dim, hidden),
        "o": (hidden, heads * dim), "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }  # fmt: skip
    torch.manual_seed(0)
    return {name: (torch.randn(shapes[name], device="cuda") * 0.02).bfloat16() for name in names}


def quantise_nf4(tensor: Tensor) -> tuple[Any, Any]:
    """An `Nf4Weight` and the same bytes as bitsandbytes' (packed, QuantState), double-quantised; None without it."""
    from rlbench_kernels import Nf4Weight, quantize_nf4

    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        return quantize_nf4(tensor), None
    pair = quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)
    return Nf4Weight.from_quant_state(*pair), pair
