"""Activations that are computed again in the backward pass instead of kept, layer by layer.

"mlp" keeps what a layer has around its attention and its residual stream: input, queries, keys, values, the attention's
output, the second residual. Gate and up, most of the rest, are computed again, 54% of a Llama-3.1-8B layer's matmuls.
"full" keeps the layer's input alone and computes all again but the down projection, whose result no gradient needs. The
first layers are recomputed: the last ones' activations are needed first and live shortest.

Source: Chen et al. 2016, arXiv:1604.06174, section 4; selective, Korthikanti et al. 2022, arXiv:2205.05198, section 5.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlbench.models.lora_dropout import current_forward, forward_of
from rlbench.models.names import FULL, MLP, NONE, PATCHED_FAMILIES
from rlbench.models.offload import HostMemory
from rlbench.models.patch import KernelLayer, KernelModule, combined, run_once


def set_recompute(tree: nn.Module, mode: str, num_layers: int | None = None, *, offload: bool = False) -> int:
    """Make the first `num_layers` decoder layers (None: all) of a model recompute; returns how many do.

    Args:
        offload: what these layers keep waits in pinned host memory.

    Raises:
        ValueError: "mlp" for layers that are not kernel-backed; `offload` without a GPU or recomputation.
    """
    layers = list(tree.base_model.layers)  # type: ignore[union-attr,arg-type]
    chosen = layers[:num_layers] if mode != NONE else []
    if offload and (mode == NONE or not next(tree.parameters()).is_cuda):
        raise ValueError(
            f"training.offload is true, which needs training.recompute=full or mlp on a GPU; found {mode} on "
            f"{next(tree.parameters()).device.type}"
        )
    keeping = HostMemory().keeping if offload else nullcontext
    for layer in chosen:
        if isinstance(layer, KernelLayer):
            layer.run, layer.recomputes_mlp, layer.keeping = recompute, mode == MLP, keeping
        elif mode == FULL:
            layer.__class__ = combined(RecomputedLayer, type(layer))
            layer.keeping = keeping
        else:
            raise ValueError(
                f"training.recompute is {mode}, which needs kernel-backed layers (a GPU, and a model of the family "
                f"{', '.join(PATCHED_FAMILIES)}); found {type(layer).__name__}, expected none or full"
            )
    for layer in layers[len(chosen) :]:
        if isinstance(layer, KernelLayer):
            layer.run, layer.recomputes_mlp, layer.keeping = run_once, False, nullcontext
    return len(chosen)


class RecomputedLayer(KernelModule):
    """Over a decoder layer of transformers."""

    keeping: Callable[[], AbstractContextManager[Any]]

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        function = partial(super().forward, **kwargs)  # type: ignore[misc]
        with self.keeping():
            return recompute(function, function, hidden_states)


def recompute(function: Callable[..., Any], again: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, of which the tensors among `args` are kept alone; `again` runs in the backward pass.

    Args:
        again: as `function`; its result's values are not read, so that it may leave out what no gradient needs.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    marker = torch.empty(0, requires_grad=True)  # without it a first layer's result would ask for no gradient
    return _Recomputed.apply(function, again, marker, *args)


class _Recomputed(torch.autograd.Function):
    """Gradients of parameters are added to their `.grad` by the inner backward pass."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Any], again: Callable[..., Any], marker: Tensor, *args: Any
    ) -> Any:  # fmt: skip
        del marker
        ctx.again, ctx.training_forward = again, current_forward()
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.save_for_backward(*(arg for arg in args if isinstance(arg, Tensor)))
        with torch.no_grad():
            return function(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [
            next(tensors).detach().requires_grad_(needed) if other is None else other
            for other, needed in zip(ctx.others, ctx.needs_input_grad[3:], strict=True)
        ]
        with torch.enable_grad(), forward_of(ctx.training_forward):
            results = ctx.again(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        pairs = [(y, grad) for y, grad in zip(results, grads, strict=True) if grad is not None and y.requires_grad]
        torch.autograd.backward([y for y, _ in pairs], [grad for _, grad in pairs])
        return None, None, None, *(x.grad if isinstance(x, Tensor) else None for x in inputs)
