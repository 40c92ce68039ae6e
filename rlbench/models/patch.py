"""Kernel-backed modules in place of those of a transformers model, by one table; reversible.

A patched module keeps its parameters and its name; only its class changes, so state dicts, PEFT and checkpoints see no
difference. Norms run as one kernel, the residual addition inside a layer with the norm behind it, q, k and v as one
function over one base and three adapters, rotation of q and k in one launch, the MLP as one function.

Shapes: T packed tokens, D hidden, H query heads, K key-value heads, d head dimension.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from rlbench.models.attention import AttentionContext, layer_scoring
from rlbench.models.lora_dropout import current_dropout
from rlbench.models.names import PATCHED_FAMILIES, POST_NORM_FAMILIES
from rlbench.models.quantised_linear import frozen_weight
from rlbench_kernels import (
    Adapters,
    Fp8Weight,
    Lora,
    LoraDropout,
    Nf4Weight,
    add_rms_norm,
    apply_rope,
    forked_rms_norm,
    lora_linear,
    lora_mlp,
    lora_qkv,
    rms_norm,
)

_ADAPTER = "default"
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # of transformers -> of `lora_mlp`
Rotation = tuple[Tensor, Tensor]  # cosines and sines [1, T, d]
Run = Callable[..., Any]  # (function, the same in the backward pass, *arguments) -> the function's result


def patch_model(model: nn.Module, family: str, *, only: type | None = None) -> Counter[str]:
    """Replace the modules of `model` that the table knows.

    Args:
        model: a module tree of its own (`share_base`), adapters already added.
        family: `config.model_type`.
        only: a kernel class; its modules and those of its subclasses alone are replaced. Of trained weights
            `KernelNorm` has gradients.

    Returns:
        How many modules of each class were replaced; empty for a family that has no table.
    """
    replaced: Counter[str] = Counter()
    table = _table(family)
    for module in model.modules():
        kernel = table.get(type(module))
        if kernel is not None and issubclass(kernel, only or object) and _can_replace(module, kernel):
            replaced[type(module).__name__] += 1
            module.__class__ = combined(kernel, type(module))
    return replaced


def unpatch_model(model: nn.Module) -> None:
    """Give every patched module its own class back."""
    for module in model.modules():
        if isinstance(module, KernelModule):
            module.__class__ = type(module).__bases__[1]


class KernelModule:
    """Marks patched modules: their class derives from (a kernel class, the original class)."""


class KernelNorm(KernelModule):
    weight: Tensor
    variance_epsilon: float
    offset: float = 0.0  # added to the weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, offset=self.offset)


class GemmaNorm(KernelNorm):
    eps: float
    offset = 1.0

    @property
    def variance_epsilon(self) -> float:  # type: ignore[override]
        return self.eps


def fork(norm: KernelNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    return forked_rms_norm(x, norm.weight, norm.variance_epsilon, offset=norm.offset)


def add(norm: KernelNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x, residual, norm.weight, norm.variance_epsilon, offset=norm.offset)


class KernelMlp(KernelModule):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    inner_cast: Adapters | None = None  # of gate and up; these and `down_cast`: see `rlbench.models.adapter_casts`
    down_cast: Adapters | None = None

    def forward(self, x: Tensor, *, values: bool = True) -> Tensor:
        layers = self.gate_proj, self.up_proj, self.down_proj
        (gate, of_gate, _), (up, of_up, _), (down, of_down, _) = map(projection, layers)
        loras = [of_gate, of_up, of_down]
        casts = self.inner_cast if any(loras[:2]) else None, self.down_cast if of_down else None
        options = {"dropouts": dropouts_of(*layers), "values": values, "overwrite": True, "casts": casts}
        return lora_mlp(x, gate, up, down, loras, _ACTIVATIONS[_activation(self)], **options)


class KernelAttention(KernelModule):
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    layer_idx: int
    qkv_cast: Adapters | None = None  # see `rlbench.models.adapter_casts`
    o_cast: Adapters | None = None

    def project(
        self, hidden_states: Tensor, rotation: Rotation, *, values: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """[1, T, D] -> queries [1, H, T, d], keys and values [1, K, T, d]; queries and keys are rotated."""
        assert len(hidden_states) == 1
        has_norms = hasattr(self, "q_norm")  # whose gradients need their inputs
        layers = self.q_proj, self.k_proj, self.v_proj
        bases, loras, biases = zip(*map(projection, layers), strict=True)
        cast = self.qkv_cast if any(loras) else None
        options = {"dropouts": dropouts_of(*layers), "values": values or has_norms, "cast": cast}
        results = lora_qkv(hidden_states.squeeze(0), bases, loras, biases, **options)
        query, key, value = (x.view(len(x), -1, self.head_dim) for x in results)
        if has_norms:
            query, key = self.q_norm(query), self.k_norm(key)  # type: ignore[operator]
        cos, sin = (x[0] for x in rotation)  # [T, d]
        query, key = apply_rope(query, key, cos, sin)
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        return query, key, value

    def attend(self, context: AttentionContext, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """-> [1, T, H, d]."""
        return context.attend(self.layer_idx, query, key, value, layer_scoring(self))

    def mix(self, attended: Tensor) -> Tensor:
        """[1, T, H, d] -> [1, T, D]."""
        base, lora, bias = projection(self.o_proj)
        output = attended.reshape(*attended.shape[:2], -1)
        if lora is None:
            return lora_qkv(output, [base], [None], [bias])[0]
        (dropout,) = dropouts_of(self.o_proj)
        return lora_linear(output, base, lora.a, lora.b, lora.scaling, bias, dropout=dropout, cast=self.o_cast)


def run_once(function: Callable[..., Any], again: Callable[..., Any], *args: Any) -> Any:
    """A `Run` that keeps all activations."""
    del again
    return function(*args)


class KernelLayer(KernelModule):
    """`rlbench.models.recompute` sets what is computed again in the backward pass.

    There `values=False`: the gradients of what a function returns are wanted, the result itself is not.
    """

    input_layernorm: Any
    post_attention_layernorm: Any
    self_attn: Any
    mlp: Any
    run: Run = staticmethod(run_once)
    recomputes_mlp: bool = False  # of the layer's parts, not of its whole
    keeping: Callable[[], AbstractContextManager[Any]] = nullcontext  # around the forward pass

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Rotation | None = None,
        past_key_values: object = None,
        *,
        attention_context: AttentionContext,
        **unused: object,
    ) -> Tensor:
        """[1, T, D] -> [1, T, D]."""
        del unused
        assert attention_mask is None and past_key_values is None
        inputs = hidden_states, position_embeddings, attention_context
        with self.keeping():
            if self.recomputes_mlp:
                return self._in_parts(*inputs)  # type: ignore[arg-type]
            return self.run(self._whole, partial(self._whole, values=False), *inputs)

    def _whole(
        self, hidden: Tensor, rotation: Rotation, context: AttentionContext, *, values: bool = True
    ) -> Tensor:  # fmt: skip
        *heads, hidden = self._heads(hidden, rotation)
        normed, residual = add(self._mlp_norm(), self._attend(context, *heads), hidden)
        return residual + self._mlp(normed, values)

    def _in_parts(self, hidden: Tensor, rotation: Rotation, context: AttentionContext) -> Tensor:
        *heads, hidden = self.run(self._heads, partial(self._heads, values=False), hidden, rotation)
        residual = hidden + self._attend(context, *heads)
        return self.run(self._after_attention, partial(self._after_attention, values=False), residual)

    def _heads(self, hidden: Tensor, rotation: Rotation, *, values: bool = True) -> tuple[Tensor, ...]:
        """Queries, keys, values, and `hidden`."""
        normed, hidden = fork(self.input_layernorm, hidden)
        return *self.self_attn.project(normed, rotation, values=values), hidden

    def _after_attention(self, residual: Tensor, *, values: bool = True) -> Tensor:
        normed, residual = fork(self._mlp_norm(), residual)
        return residual + self._mlp(normed, values)

    def _mlp_norm(self) -> Any:
        return self.post_attention_layernorm

    def _attend(self, context: AttentionContext, *heads: Tensor) -> Tensor:
        """What attention adds to the residual stream."""
        return self.self_attn.mix(self.self_attn.attend(context, *heads))

    def _mlp(self, normed: Tensor, values: bool) -> Tensor:
        """What the MLP adds to it."""
        has_kernel = isinstance(self.mlp, KernelMlp)
        return self.mlp(normed, **({"values": values} if has_kernel else {}))


class GemmaLayer(KernelLayer):
    """Norms before and behind attention and MLP. A norm behind needs its input for the gradient, so `values` stay."""

    pre_feedforward_layernorm: Any
    post_feedforward_layernorm: Any

    def _mlp_norm(self) -> Any:
        return self.pre_feedforward_layernorm

    def _attend(self, context: AttentionContext, *heads: Tensor) -> Tensor:
        return self.post_attention_layernorm(super()._attend(context, *heads))

    def _mlp(self, normed: Tensor, values: bool) -> Tensor:
        return self.post_feedforward_layernorm(super()._mlp(normed, values=True))


def projection(layer: nn.Module) -> tuple[Tensor | Nf4Weight | Fp8Weight, Lora | None, Tensor | None]:
    """Frozen matrix, adapter (None: there is none, or it is switched off) and bias of a linear layer."""
    if not isinstance(layer, PeftLinear):
        return frozen_weight(layer), None, layer.bias  # type: ignore[return-value]
    base = layer.base_layer
    assert isinstance(base, nn.Linear) and not layer.merged
    if layer.disable_adapters:
        return frozen_weight(base), None, base.bias
    lora_a, lora_b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight  # type: ignore[union-attr]
    return frozen_weight(base), Lora(lora_a, lora_b, layer.scaling[_ADAPTER]), base.bias  # type: ignore[arg-type]


def dropouts_of(*layers: nn.Module) -> list[LoraDropout | None]:
    """What each drops of its adapter's input in the current forward."""
    return [current_dropout(layer, _ADAPTER) for layer in layers]


_PARTS: dict[str, type] = {
    "RMSNorm": KernelNorm, "MLP": KernelMlp, "Attention": KernelAttention, "DecoderLayer": KernelLayer,
}  # fmt: skip
_GEMMA_PARTS = _PARTS | {"RMSNorm": GemmaNorm, "DecoderLayer": GemmaLayer}


def _table(family: str) -> dict[type, type]:
    """Kernel class by the transformers class that it replaces."""
    if family not in PATCHED_FAMILIES:
        return {}
    prefix = PATCHED_FAMILIES[family]
    module = importlib.import_module(f"transformers.models.{prefix.lower()}.modeling_{prefix.lower()}")
    parts = _GEMMA_PARTS if family in POST_NORM_FAMILIES else _PARTS
    return {getattr(module, prefix + part): kernel for part, kernel in parts.items()}


def _activation(mlp: Any) -> str:
    config = mlp.config
    return getattr(config, "hidden_activation", None) or config.hidden_act


def _can_replace(module: Any, kernel: type) -> bool:
    """MLPs with a bias or another activation stay as they are."""
    if kernel is not KernelMlp:
        return True
    layers = [module.gate_proj, module.up_proj, module.down_proj]
    return _activation(module) in _ACTIVATIONS and all(layer.bias is None for layer in layers)


_CLASSES: dict[tuple[type, type], type] = {}


def combined(kernel: type, original: type) -> type:
    """A class whose forward is the kernel's and whose everything else is the original's."""
    if (kernel, original) not in _CLASSES:
        _CLASSES[kernel, original] = type(f"Kernel{original.__name__}", (kernel, original), {})
    return _CLASSES[kernel, original]


def describe(replaced: Counter[str]) -> str:
    """One line for the user."""
    if not replaced:
        return "no modules replaced"
    return ", ".join(f"{count} {name}" for name, count in replaced.items())


def is_patch_useful(device: torch.device) -> bool:
    """The kernels pay on a GPU; on a CPU their references compute what transformers computes."""
    return device.type == "cuda"
