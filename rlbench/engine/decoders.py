"""Forward passes of the HF engine: hidden states of token rows, with attention left to a context.

`LlamaDecoder` computes the families that are plain Llama in a third of the operations that the transformers modules
need (fused q-k-v and gate-up projections, one rotary call for queries and keys); on a CPU a decoding step of few rows
is mostly the cost of starting operations. `ModuleDecoder` runs any other transformers model through its own modules.

Shapes: B rows, L tokens a row, H query heads, K key-value heads, d head dimension, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlbench.engine.adapter_linear import AdapterLinear, AdapterSlots, Slot
from rlbench.models.attention import AttentionContext, layer_scoring, use_rlbench_attention
from rlbench.models.base import share_base

_PLAIN_LLAMA = ("llama", "mistral", "qwen2")


class Decoder(Protocol):
    slots: AdapterSlots

    def hidden(self, token_ids: Tensor, position_ids: Tensor, context: AttentionContext) -> Tensor:
        """int64 [B, L] x 2 -> [B, L, D] after the final norm."""
        ...


def make_decoder(base: PreTrainedModel) -> Decoder:
    """The fastest decoder that computes `base`. Refuses attention features that the contexts do not compute."""
    tree = share_base(base)
    use_rlbench_attention(tree)
    is_plain = base.config.model_type in _PLAIN_LLAMA and base.config.hidden_act == "silu"
    return LlamaDecoder(tree) if is_plain else ModuleDecoder(tree)


class ModuleDecoder:
    """The model's own modules, each linear layer with room for an adapter."""

    def __init__(self, tree: PreTrainedModel) -> None:
        self._tree = tree
        head = tree.get_output_embeddings()
        slots = []
        for name, module in list(tree.named_modules()):
            if isinstance(module, nn.Linear) and module is not head:
                slots.append(Slot(AdapterLinear([module]), (name,)))
                tree.set_submodule(name, slots[-1].layer)
        self.slots = AdapterSlots(slots)

    def hidden(self, token_ids: Tensor, position_ids: Tensor, context: AttentionContext) -> Tensor:
        output = self._tree.base_model(
            input_ids=token_ids, position_ids=position_ids, use_cache=False, attention_context=context
        )
        return output.last_hidden_state


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor  # [D]
    qkv: AdapterLinear
    output: AdapterLinear
    mlp_norm: Tensor  # [D]
    gate_up: AdapterLinear
    down: AdapterLinear


class LlamaDecoder:
    """RMSNorm, rotary grouped-query attention, SwiGLU, with the rounding of the transformers modules."""

    def __init__(self, tree: PreTrainedModel) -> None:
        model: Any = tree.base_model
        prefix = f"{tree.base_model_prefix}.layers"
        self._embedding = model.embed_tokens
        self._rotary = model.rotary_emb
        self._final_norm = model.norm.weight.data
        self._eps = model.norm.variance_epsilon
        self._head_dim = model.layers[0].self_attn.head_dim
        self._scorings = [layer_scoring(layer.self_attn) for layer in model.layers]
        slots: list[Slot] = []

        def fused(parent: nn.Module, path: str, *names: str) -> AdapterLinear:
            layer = AdapterLinear([parent.get_submodule(name) for name in names])  # type: ignore[misc]
            slots.append(Slot(layer, tuple(f"{path}.{name}" for name in names)))
            return layer

        self._layers = [
            _Layer(
                layer.input_layernorm.weight.data,
                fused(layer.self_attn, f"{prefix}.{i}.self_attn", "q_proj", "k_proj", "v_proj"),
                fused(layer.self_attn, f"{prefix}.{i}.self_attn", "o_proj"),
                layer.post_attention_layernorm.weight.data,
                fused(layer.mlp, f"{prefix}.{i}.mlp", "gate_proj", "up_proj"),
                fused(layer.mlp, f"{prefix}.{i}.mlp", "down_proj"),
            )
            for i, layer in enumerate(model.layers)
        ]
        self.slots = AdapterSlots(slots)

    def hidden(self, token_ids: Tensor, position_ids: Tensor, context: AttentionContext) -> Tensor:
        x = self._embedding(token_ids)  # [B, L, D]
        cos, sin = self._rotary(x, position_ids)  # [B, L, d]
        half = self._head_dim // 2
        # rotate_half(x) * sin = roll(x, d/2) * (-sin of the first half, sin of the second)
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)[:, :, None]
        cos = cos[:, :, None]  # [B, L, 1, d]
        for index, layer in enumerate(self._layers):
            x = x + self._attention(index, layer, self._norm(x, layer.input_norm), cos, sin, context)
            x = x + self._mlp(layer, self._norm(x, layer.mlp_norm))
        return self._norm(x, self._final_norm)

    def _attention(
        self, index: int, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext
    ) -> Tensor:
        qkv = layer.qkv(x)  # [B, L, (H + 2K) d]
        num_qk = layer.qkv.rows[1].stop
        num_heads = layer.qkv.rows[0].stop // self._head_dim
        qk = qkv[..., :num_qk].unflatten(-1, (-1, self._head_dim))  # [B, L, H + K, d]
        qk = qk * cos + qk.roll(self._head_dim // 2, dims=-1) * sin
        value = qkv[..., num_qk:].unflatten(-1, (-1, self._head_dim))  # [B, L, K, d]
        query, key, value = (t.transpose(1, 2) for t in (qk[:, :, :num_heads], qk[:, :, num_heads:], value))
        attended = context.attend(index, query, key, value, self._scorings[index])  # [B, L, H, d]
        return layer.output(attended.flatten(2))

    def _mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(x).chunk(2, dim=-1)
        return layer.down(F.silu(gate) * up)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(dim=-1, keepdim=True).add_(self._eps).rsqrt_()
        return weight * (wide * scale).to(x.dtype)
