"""Activations that are computed again in the backward pass instead of kept, layer by layer.

"except_attention" keeps queries, keys, values and the attention's output of a layer, so that attention, whose cost
grows with the square of the length, runs once; "full" keeps the layer's input alone. The first layers are recomputed:
the last ones' activations are needed first and live shortest.

Source: Chen et al. 2016, arXiv:1604.06174, section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlbench.models.patch import KernelLayer, KernelModule, call, combined

NONE, EXCEPT_ATTENTION, FULL = "none", "except_attention", "full"  # training.recompute


def set_recompute(tree: nn.Module, mode: str, num_layers: int | None = None) -> int:
    """Make the first `num_layers` decoder layers (None: all) of a model recompute; returns how many do.

    Raises:
        ValueError: "except_attention" for layers that are not kernel-backed.
    """
    layers = list(tree.base_model.layers)  # type: ignore[union-attr,arg-type]
    chosen = layers[:num_layers] if mode != NONE else []
    for layer in chosen:
        if isinstance(layer, KernelLayer):
            layer.run_parts, layer.run_whole = (_again, call) if mode == EXCEPT_ATTENTION else (call, _again)
        elif mode == FULL:
            layer.__class__ = combined(RecomputedLayer, type(layer))
        else:
            raise ValueError(
                f"training.recompute is {mode}, which needs kernel-backed layers (a GPU, and a Llama, Mistral, Qwen2 "
                f"or Qwen3 model); found {type(layer).__name__}, expected none or full"
            )
    return len(chosen)


class RecomputedLayer(KernelModule):
    """Over a decoder layer of transformers."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return _again(super().forward, hidden_states, **kwargs)  # type: ignore[misc]


def _again(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function` keeps its arguments alone and runs once more in the backward pass."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
