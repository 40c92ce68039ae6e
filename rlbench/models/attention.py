"""One attention function, registered with transformers, that asks a context object how to attend.

transformers lets a model call any registered attention function and passes unknown keyword arguments through to it.
We register one, "rlbench", and hand every forward an `attention_context`: packed training, prefill and decoding
differ only in the context. The modelling code of transformers is not touched.

Shapes: T packed tokens, B sequences, L padded length, H query heads, K key-value heads, d head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from rlbench.data.packing import PackedLayout, PaddedLayout
from rlbench_kernels.masked_attention import additive, masked_attention
from rlbench_kernels.packed_attention import SharedPromptLayout, packed_attention, packed_attention_backend

ATTENTION_NAME = "rlbench"
_LAYER_TYPES = ("full_attention", "sliding_attention")
_CAPPED_FAMILIES = ("gemma2",)


@dataclass(frozen=True, slots=True)
class Scoring:
    """What a layer does with the scores of queries and keys.

    Attributes:
        scaling: they are multiplied by it.
        window: a token sees itself and the window - 1 positions before it; None: all before it.
        softcap: they are then capped at it, softcap tanh(score / softcap); None: not.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None

    def within(self, num_tokens: int) -> Scoring:
        """The same for sequences of at most `num_tokens`: a window over all of them is none."""
        return self if self.window is None or self.window < num_tokens else replace(self, window=None)


class AttentionContext(Protocol):
    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """[B, H, L, d], [B, K, L, d], [B, K, L, d] -> [B, L, H, d]; rotary embeddings are already applied."""
        ...


def use_rlbench_attention(model: PreTrainedModel) -> None:
    """Make `model` call this module's attention function; every forward then needs `attention_context=`.

    Raises:
        ValueError: the model uses an attention feature that the contexts do not compute.
    """
    AttentionInterface.register(ATTENTION_NAME, _attention)
    config = model.config.get_text_config()
    if feature := _missing_feature(config):
        raise ValueError(
            f"model.path: {config.model_type} has {feature}, which rlbench's attention does not compute; expected "
            "causal attention, full or with sliding windows, e.g. a model of the Llama, Qwen or Gemma family"
        )
    model.set_attn_implementation(ATTENTION_NAME)


def _missing_feature(config: Any) -> str:
    others = set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES)
    if others:
        return f"layers of type {', '.join(sorted(others))}"
    if getattr(config, "use_bidirectional_attention", False):
        return "use_bidirectional_attention"
    softcap, window = getattr(config, "attn_logit_softcapping", None), getattr(config, "sliding_window", None)
    if softcap and config.model_type not in _CAPPED_FAMILIES:  # transformers reads it in these alone
        return f"attn_logit_softcapping={softcap}"
    if window and config.model_type == "llama":  # which vLLM reads there, transformers does not
        return f"sliding_window={window}"
    return ""


def scoring_features(config: Any) -> dict[str, Any]:
    """`window` and `softcap` of a model's `Scoring`, None for what no layer has.

    Args:
        config: the text config of a transformers model.
    """
    is_on = getattr(config, "use_sliding_window", True)
    is_windowed = is_on and "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    softcap = getattr(config, "attn_logit_softcapping", None) if config.model_type in _CAPPED_FAMILIES else None
    return {"window": getattr(config, "sliding_window", None) if is_windowed else None, "softcap": softcap}


def layer_scoring(attention: Any) -> Scoring:
    """Of a layer's attention module of transformers, as it would call an attention function."""
    config = attention.config
    return Scoring(
        attention.scaling,
        getattr(attention, "sliding_window", getattr(config, "sliding_window", None)),
        scoring_features(config)["softcap"],
    )


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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    del unused
    assert attention_mask is None and dropout == 0.0 and s_aux is None
    layer_index: int = module.layer_idx  # type: ignore[assignment]
    scoring = Scoring(scaling, sliding_window, softcap)
    return attention_context.attend(layer_index, query, key, value, scoring), None


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
    causally to its own completion; where the layer has a window, to positions within it. Prompt keys and values exist
    once. On CUDA in 16 bits by flash attention (`rlbench_kernels.packed_attention`), elsewhere by padded batches, for
    which they are gathered per completion.
    """

    def __init__(self, layout: PackedLayout, dtype: torch.dtype) -> None:
        """
        Args:
            layout: of the microbatch.
            dtype: of queries, keys and values.
        """
        self._layout, self._dtype = layout, dtype
        self._row_masks: dict[tuple[int, int | None], Tensor] = {}
        self._prompt_masks: dict[int, Tensor] = {}

    @cached_property
    def _shared_layout(self) -> SharedPromptLayout:
        return SharedPromptLayout.from_lengths(self._layout.lengths, self._layout.device)

    @cached_property
    def _padded(self) -> PaddedLayout:
        return self._layout.padded()

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """[1, H, T, d], [1, K, T, d], [1, K, T, d] -> [1, T, H, d]."""
        del layer_index
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, H or K, d]
        shared = self._shared_layout
        scoring = scoring.within(shared.max_context)
        features = {"window": scoring.window, "softcap": scoring.softcap}
        if query.is_cuda and packed_attention_backend(query, **features) != "reference":
            return packed_attention(query, key, value, shared, scale=scoring.scaling, **features).unsqueeze(0)
        of_prompts = self._attend_prompts(query, key, value, scoring)  # [P_all, H, d]
        of_completions = self._attend_completions(query, key, value, scoring)  # [C_all, H, d]
        output = torch.cat([of_prompts, of_completions])[self._padded.unpad_index]  # [T, H, d]
        return output.unsqueeze(0)

    def _attend_prompts(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        rows = self._padded.prompt_rows  # [G, P]
        repeat = query.shape[1] // key.shape[1]
        q, k, v = (x[rows].transpose(1, 2) for x in (query, key, value))  # [G, H or K, P, d]
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        # Right padding is never attended to by a real prompt token: causal masking is enough.
        mask = None if scoring.window is None else self._prompt_mask(scoring.window)
        output = masked_attention(q, k, v, mask, scale=scoring.scaling, softcap=scoring.softcap)  # [G, H, P, d]
        return output.transpose(1, 2).flatten(0, 1)

    def _attend_completions(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        layout = self._padded
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        q = query[layout.completion_rows].transpose(1, 2)  # [B, H, C, d]
        k, v = (x[layout.key_rows].transpose(1, 2) for x in (key, value))  # [B, K, P + C, d]
        output = masked_attention(
            heads_as_rows(q, num_kv_heads),
            k,
            v,
            self._row_mask(num_heads // num_kv_heads, scoring.window),
            scale=scoring.scaling,
            softcap=scoring.softcap,
        )
        return rows_as_heads(output, num_heads).transpose(1, 2).flatten(0, 1)

    def _prompt_mask(self, window: int) -> Tensor:
        """[P, P], float: 0 where attended, -inf elsewhere."""
        if window not in self._prompt_masks:
            rows = self._padded.prompt_rows
            self._prompt_masks[window] = additive(causal_window(rows.shape[1], window, rows.device), self._dtype)
        return self._prompt_masks[window]

    def _row_mask(self, repeat: int, window: int | None) -> Tensor:
        """[B, 1, repeat * C, P + C], float: 0 where attended, -inf elsewhere."""
        if (repeat, window) not in self._row_masks:
            mask = additive(self._padded.completion_mask(window), self._dtype)  # [B, C, P + C]
            self._row_masks[repeat, window] = mask.repeat(1, repeat, 1).unsqueeze(1)
        return self._row_masks[repeat, window]


def causal_window(num_tokens: int, window: int, device: torch.device) -> Tensor:
    """bool [L, L]: True where query i sees key j, 0 <= i - j < window."""
    return torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril().triu(1 - window)
