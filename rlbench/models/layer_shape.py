"""The sizes of a decoder layer: what it keeps of each token, and the bytes of a model made of such layers.

Shapes: T packed tokens, D hidden, H query heads, K key-value heads, d head dimension, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlbench.config.schema import RunConfig
from rlbench.models.names import FULL, MLP, POST_NORM_FAMILIES, QK_NORM_FAMILIES

GIB = 2**30
# Of one number of a linear layer. nf4: 4 bits, a byte for 64 of them, a float32 for 256 of those. fp8: a float32 a row.
_QUANTISED_BYTES = {"nf4": 0.516, "fp8": 1.002}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What decides how much a decoder layer keeps."""

    num_layers: int
    hidden: int  # D
    query: int  # H d
    key: int  # K d
    intermediate: int  # I
    has_qk_norm: bool
    has_post_norms: bool = False  # behind attention and MLP

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Outputs and inputs of the linear layers of one layer."""
        attention = [(self.query, self.hidden), *2 * [(self.key, self.hidden)], (self.hidden, self.query)]
        return [*attention, *2 * [(self.intermediate, self.hidden)], (self.hidden, self.intermediate)]

    @property
    def linear_weights(self) -> int:
        """Numbers in the matrices of one layer."""
        return sum(outputs * inputs for outputs, inputs in self.matrices)

    @property
    def adapter_width(self) -> int:
        """Inputs and outputs of the linear layers of one layer: numbers of an adapter of rank 1."""
        return sum(outputs + inputs for outputs, inputs in self.matrices)

    def adapter_numbers(self, rank: int) -> int:
        """Numbers of an adapter on all linear layers of all decoder layers."""
        return rank * self.num_layers * self.adapter_width

    @classmethod
    def from_config(cls, config: Any) -> LayerShape:
        """
        Args:
            config: the text config of a transformers model.
        """
        return cls(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            query=config.num_attention_heads * _head_dim(config),
            key=key_numbers(config),
            intermediate=config.intermediate_size,
            has_qk_norm=any(config.model_type.startswith(family) for family in QK_NORM_FAMILIES),
            has_post_norms=config.model_type in POST_NORM_FAMILIES,
        )

    def kept(self, mode: str) -> int:
        """Numbers that a kernel-backed layer keeps for each token until its backward pass."""
        if mode == FULL:
            return self.hidden
        around = 2 * self.hidden + 2 * self.query + 2 * self.key  # both residuals, q, k, v, attention's output
        post_norm = self.hidden if self.has_post_norms else 0  # its input
        if mode == MLP:
            return around + post_norm
        qk_norm = self.query + self.key if self.has_qk_norm else 0
        # both norms' outputs, gate and up
        return around + qk_norm + 2 * post_norm + 2 * self.hidden + 2 * self.intermediate


def key_numbers(config: Any) -> int:
    """K d: numbers of a token's keys in one layer, and of its values.

    Args:
        config: the text config of a transformers model of any family.
    """
    return (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * _head_dim(config)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def base_bytes(shape: LayerShape, text_config: Any, item_bytes: int, *, quantization: str) -> int:
    """Bytes of the frozen weights."""
    linear = shape.num_layers * shape.linear_weights
    tables = text_config.vocab_size * shape.hidden * (1 if text_config.tie_word_embeddings else 2)
    return int(linear * _QUANTISED_BYTES.get(quantization, item_bytes) + tables * item_bytes)


def forward_bytes(shape: LayerShape, num_tokens: int, item_bytes: int) -> int:
    """The largest moment of a forward pass without gradient: gate, up, their product, and two matrices made dense."""
    inside = num_tokens * (3 * shape.intermediate + 4 * shape.hidden)
    return item_bytes * (inside + 2 * shape.intermediate * shape.hidden)


def item_bytes(config: RunConfig) -> int:
    """Of one number of activations, keys and values."""
    return 4 if config.model.dtype == "float32" else 2
