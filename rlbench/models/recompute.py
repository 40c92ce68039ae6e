"""Activations that are computed again in the backward pass instead of kept, layer by layer.

"except_attention" keeps queries, keys, values and the attention's output of a layer, so that attention, whose cost
grows with the square of the length, runs once; "full" keeps the layer's input alone, which may wait in host memory. The
first layers are recomputed: the last ones' activations are needed first and live shortest.

Source: Chen et al. 2016, arXiv:1604.06174, section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlbench.models.offload import HostMemory
from rlbench.models.patch import KernelLayer, KernelModule, call, combined

NONE, EXCEPT_ATTENTION, FULL = "none", "except_attention", "full"  # training.recompute


def set_recompute(tree: nn.Module, mode: str, num_layers: int | None = None, *, offload: bool = False) -> int:
    """Make the first `num_layers` decoder layers (None: all) of a model recompute; returns how many do.

    Args:
        offload: their inputs wait in pinned host memory.

    Raises:
        ValueError: "except_attention" for layers that are not kernel-backed; `offload` without a GPU or in a mode that
            keeps more than inputs.
    """
    layers = list(tree.base_model.layers)  # type: ignore[union-attr,arg-type]
    chosen = layers[:num_layers] if mode != NONE else []
    if offload and (mode != FULL or not next(tree.parameters()).is_cuda):
        raise ValueError(
            f"training.offload is true, which needs training.recompute=full on a GPU; found {mode} on "
            f"{next(tree.parameters()).device.type}"
        )
    rerun = partial(_again, HostMemory() if offload else None)
    for layer in chosen:
        if isinstance(layer, KernelLayer):
            layer.run_parts, layer.run_whole = (rerun, call) if mode == EXCEPT_ATTENTION else (call, rerun)
        elif mode == FULL:
            layer.__class__ = combined(RecomputedLayer, type(layer))
            layer.run = rerun
        else:
            raise ValueError(
                f"training.recompute is {mode}, which needs kernel-backed layers (a GPU, and a Llama, Mistral, Qwen2 "
                f"or Qwen3 model); found {type(layer).__name__}, expected none or full"
            )
    return len(chosen)


class RecomputedLayer(KernelModule):
    """Over a decoder layer of transformers."""

    run: Callable[..., Any]

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return self.run(partial(super().forward, **kwargs), hidden_states)  # type: ignore[misc]


def _again(memory: HostMemory | None, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, of which the tensors among `args` are kept alone; it runs once more in the backward pass."""
    if not torch.is_grad_enabled():
        return function(*args)
    marker = torch.empty(0, requires_grad=True)  # without it a first layer's result would ask for no gradient
    return _Recomputed.apply(function, memory, marker, *args)


class _Recomputed(torch.autograd.Function):
    """Gradients of parameters are added to their `.grad` by the inner backward pass."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], memory: HostMemory | None, marker: Tensor, *args: Any) -> Any:
        del marker
        ctx.function, ctx.memory = function, memory
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if memory is None:
            ctx.save_for_backward(*tensors)
        else:
            ctx.places = [memory.put(tensor) for tensor in tensors]
        with torch.no_grad():
            return function(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors if ctx.memory is None else map(ctx.memory.get, ctx.places))
        inputs = [
            next(tensors).detach().requires_grad_(needed) if other is None else other
            for other, needed in zip(ctx.others, ctx.needs_input_grad[3:], strict=True)
        ]
        with torch.enable_grad():
            results = ctx.function(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
        torch.autograd.backward([result for result, _ in pairs], [grad for _, grad in pairs])
        return None, None, None, *(x.grad if isinstance(x, Tensor) else None for x in inputs)
