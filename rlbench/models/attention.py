"""One attention function, registered with transformers, that asks a context object how to attend.

transformers lets a model call any registered attention function and passes unknown keyword arguments through to it.
We register one, "rlbench", and hand every forward an `attention_context`: packed training, prefill and decoding
differ only in the context. The modelling code of transformers is not touched.

Shapes: T packed tokens, B sequences, L padded length, H query heads, K key-value heads, d head dimension.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from rlbench.data.packing import PackedLayout, PaddedLayout
from rlbench_kernels.packed_attention import SharedPromptLayout, packed_attention, packed_attention_backend

ATTENTION_NAME = "rlbench"
_UNSUPPORTED = ("softcap", "sliding_window", "s_aux")


class AttentionContext(Protocol):
    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """[B, H, L, d], [B, K, L, d], [B, K, L, d] -> [B, L, H, d]; rotary embeddings are already applied."""
        ...


def use_rlbench_attention(model: PreTrainedModel) -> None:
    """Make `model` call this module's attention function; every forward then needs `attention_context=`.

    Raises:
        ValueError: if the model uses an attention feature that the contexts do not compute.
    """
    AttentionInterface.register(ATTENTION_NAME, _attention)
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    softcap = getattr(config, "attn_logit_softcapping", None)
    if window or softcap:
        feature = f"sliding_window={window}" if window else f"attn_logit_softcapping={softcap}"
        raise ValueError(
            f"model.path: {config.model_type} uses {feature}, which rlbench's packed attention does not compute yet; "
            "expected a model with full causal attention, e.g. of the Llama, Qwen2 or Qwen3 family"
        )
    model.set_attn_implementation(ATTENTION_NAME)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_context: AttentionContext,
    scaling: float,
    dropout: float = 0.0,
    **unused: object,
) -> tuple[Tensor, None]:
    assert attention_mask is None and dropout == 0.0
    assert not any(unused.get(name) for name in _UNSUPPORTED), unused
    layer_index: int = module.layer_idx  # type: ignore[assignment]
    return attention_context.attend(layer_index, query, key, value, scaling), None


def heads_as_rows(query: Tensor, num_kv_heads: int) -> Tensor:
    """[B, H, L, d] -> [B, K, H/K * L, d]: query heads that share a key-value head become more query rows.

    Grouped-query attention then needs no copy of keys and values. On 2 CPU cores (bf16, 64 x 9 heads, 3 key-value
    heads, 128 keys, one query) this takes 0.7 ms against 4.2 ms with `enable_gqa`.
    """
    batch, heads, length, dim = query.shape
    return query.reshape(batch, num_kv_heads, heads // num_kv_heads * length, dim)


def rows_as_heads(output: Tensor, num_heads: int) -> Tensor:
    """Inverse of `heads_as_rows`: [B, K, H/K * L, d] -> [B, H, L, d]."""
    batch, kv_heads, rows, dim = output.shape
    return output.reshape(batch, num_heads, rows * kv_heads // num_heads, dim)


class PackedAttention:
    """Attention over one packed microbatch in which the completions of a group share their prompt.

    A prompt token attends causally within its prompt. A completion token attends to its group's whole prompt and
    causally to its own completion. Prompt keys and values exist once. On CUDA in 16 bits by flash attention
    (`rlbench_kernels.packed_attention`), elsewhere by padded batches, for which they are gathered per completion.
    """

    def __init__(self, layout: PackedLayout, dtype: torch.dtype) -> None:
        """
        Args:
            layout: of the microbatch.
            dtype: of queries, keys and values.
        """
        self._layout, self._dtype = layout, dtype
        self._row_masks: dict[int, Tensor] = {}

    @cached_property
    def _mask(self) -> Tensor:
        """[B, C, P + C]: 0 where a completion token attends, -inf elsewhere."""
        completion_mask = self._padded.completion_mask()
        mask = torch.zeros(completion_mask.shape, dtype=self._dtype, device=completion_mask.device)
        return mask.masked_fill_(~completion_mask, float("-inf"))

    @cached_property
    def _shared_layout(self) -> SharedPromptLayout:
        return SharedPromptLayout.from_lengths(self._layout.lengths, self._layout.device)

    @cached_property
    def _padded(self) -> PaddedLayout:
        return self._layout.padded()

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """[1, H, T, d], [1, K, T, d], [1, K, T, d] -> [1, T, H, d]."""
        del layer_index
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H or K, d]
        if query.is_cuda and packed_attention_backend(query, self._shared_layout.max_sequence) != "reference":
            return packed_attention(query, key, value, self._shared_layout, scale=scaling).unsqueeze(0)
        of_prompts = self._attend_prompts(query, key, value, scaling)  # [P_all, H, d]
        of_completions = self._attend_completions(query, key, value, scaling)  # [C_all, H, d]
        output = torch.cat([of_prompts, of_completions])[self._padded.unpad_index]  # [T, H, d]
        return output.unsqueeze(0)

    def _attend_prompts(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        rows = self._padded.prompt_rows  # [G, P]
        repeat = query.shape[1] // key.shape[1]
        q, k, v = (x[rows].transpose(1, 2) for x in (query, key, value))  # [G, H or K, P, d]
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        # Right padding is never attended to by a real prompt token: causal masking is enough.
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)  # [G, H, P, d]
        return output.transpose(1, 2).flatten(0, 1)

    def _attend_completions(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        layout = self._padded
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        q = query[layout.completion_rows].transpose(1, 2)  # [B, H, C, d]
        k, v = (x[layout.key_rows].transpose(1, 2) for x in (key, value))  # [B, K, P + C, d]
        output = F.scaled_dot_product_attention(
            heads_as_rows(q, num_kv_heads), k, v, attn_mask=self._row_mask(num_heads // num_kv_heads), scale=scaling
        )
        return rows_as_heads(output, num_heads).transpose(1, 2).flatten(0, 1)

    def _row_mask(self, repeat: int) -> Tensor:
        """[B, 1, repeat * C, P + C], float: 0 where attended, -inf elsewhere."""
        if repeat not in self._row_masks:
            self._row_masks[repeat] = self._mask.repeat(1, repeat, 1).unsqueeze(1)
        return self._row_masks[repeat]
