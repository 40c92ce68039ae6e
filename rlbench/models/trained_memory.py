"""Device memory of what is trained, by arithmetic: float32 numbers, gradients, moments, and 16-bit casts of adapters.

An adapter is counted on all linear layers; norms and a value head, D numbers each, are not.
"""

from __future__ import annotations

from typing import Any

from rlbench.config.full_training import FULL
from rlbench.config.schema import RunConfig
from rlbench.models.layer_shape import LayerShape, base_bytes, item_bytes
from rlbench.models.moments import MomentBytes, count_moments

_FLOAT32 = 4  # bytes of a number, and of its gradient


def policy_bytes(config: RunConfig, shape: LayerShape, text_config: Any) -> int:
    """What is trained takes beside the base: an adapter, or masters and gradients of all weights; and its moments.

    Args:
        config: derived.
        text_config: of the base, from transformers.
    """
    if config.training.parameters != FULL:
        return trained_adapter_bytes(config, shape)
    is_own_master = item_bytes(config) == _FLOAT32
    numbers = base_bytes(shape, text_config, 1, quantization="none")
    return numbers * _FLOAT32 * (1 if is_own_master else 2) + _policy_moments(config, shape, text_config).device


def trained_adapter_bytes(config: RunConfig, shape: LayerShape) -> int:
    """An adapter of lora.rank with its optimizer: of a policy, of a critic."""
    numbers = shape.adapter_numbers(config.lora.rank)
    return numbers * (2 * _FLOAT32 + _cast_bytes(config)) + _adapter_moments(config, shape).device


def frozen_adapter_bytes(config: RunConfig, shape: LayerShape, rank: int) -> int:
    """An adapter that is not trained."""
    return shape.adapter_numbers(rank) * (_FLOAT32 + _cast_bytes(config))


def paged_bytes(config: RunConfig, shape: LayerShape, text_config: Any) -> int:
    """Moments, of policy and critic, that need not fit on the device."""
    paged = _policy_moments(config, shape, text_config).paged
    if config.stage == "rl" and config.algorithm.has_critic:
        paged += _adapter_moments(config, shape).paged
    return paged


def _policy_moments(config: RunConfig, shape: LayerShape, text_config: Any) -> MomentBytes:
    if config.training.parameters != FULL:
        return _adapter_moments(config, shape)
    num_tables = 1 if text_config.tie_word_embeddings else 2
    tables = [(text_config.vocab_size, shape.hidden)] * num_tables
    return count_moments(shape.matrices * shape.num_layers, config.optim, tables=tables)


def _adapter_moments(config: RunConfig, shape: LayerShape) -> MomentBytes:
    rank = config.lora.rank
    pairs = [[(rank, inputs), (outputs, rank)] for outputs, inputs in shape.matrices]
    return count_moments([part for pair in pairs for part in pair] * shape.num_layers, config.optim)


def _cast_bytes(config: RunConfig) -> int:
    """Of a number of an adapter in the compute dtype, kept between forward passes (`rlbench.models.adapter_casts`)."""
    item = item_bytes(config)
    return item if item < _FLOAT32 else 0
