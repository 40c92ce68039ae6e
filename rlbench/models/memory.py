"""How much device memory a step takes: which layers are recomputed, and whether generation has room for a dense base.

Shapes: T packed tokens, D hidden, H query heads, K key-value heads, d head dimension, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlbench.config.derive import Derivation, HardwareFacts
from rlbench.config.full_training import FULL as ALL_WEIGHTS
from rlbench.config.schema import AUTO, RunConfig
from rlbench.models.names import FULL, MLP, NONE, PATCHED_FAMILIES, POST_NORM_FAMILIES, QK_NORM_FAMILIES

GIB = 2**30
# Of one number of a linear layer. nf4: 4 bits, a byte for 64 of them, a float32 for 256 of those. fp8: a float32 a row.
_QUANTISED_BYTES = {"nf4": 0.516, "fp8": 1.002}
_SHARE = 0.9  # of the memory that a phase may fill
_ADAMW_BYTES = 16  # of one trained number: itself, its gradient and two moments in float32
_RESERVE_GIB = 1.5  # CUDA context, the head's tiles, fragmentation
_VLLM_GIB = 1.5  # its graphs and workspaces; its keys and values are given back while training


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
    def linear_weights(self) -> int:
        """Numbers in the matrices of one layer."""
        return self.hidden * (2 * self.query + 2 * self.key + 3 * self.intermediate)

    @property
    def adapter_width(self) -> int:
        """Inputs and outputs of the linear layers of one layer: numbers of an adapter of rank 1."""
        return 2 * (self.hidden + self.query) + 2 * (self.hidden + self.key) + 3 * (self.hidden + self.intermediate)

    @classmethod
    def from_config(cls, config: Any) -> LayerShape:
        """
        Args:
            config: the text config of a transformers model.
        """
        heads = config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            query=heads * dim,
            key=(config.num_key_value_heads or heads) * dim,
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


def kept_bytes(shape: LayerShape, mode: str, num_recomputed: int, num_tokens: int, item_bytes: int) -> int:
    """Bytes of activations alive when the forward ends, and of the one layer that is computed again."""
    kept = num_recomputed * shape.kept(mode) + (shape.num_layers - num_recomputed) * shape.kept(NONE)
    again = shape.kept(NONE) if num_recomputed and mode != NONE else 0
    return num_tokens * item_bytes * (kept + again)


def choose_recompute(shape: LayerShape, num_tokens: int, item_bytes: int, available: int) -> tuple[str, int]:
    """The mode and the number of layers that cost the least time and fit.

    Args:
        num_tokens: T of one forward.
        item_bytes: of one number.
        available: bytes for activations.

    Returns:
        ("none", 0) if all fits; ("full", all layers) if nothing does.
    """
    for mode in (MLP, FULL):
        for number in range(shape.num_layers + 1):
            if kept_bytes(shape, mode, number, num_tokens, item_bytes) <= available:
                return (mode, number) if number else (NONE, 0)
    return FULL, shape.num_layers


def derive_recompute(config: RunConfig, facts: HardwareFacts, text_config: Any) -> list[Derivation]:
    """Fill training.recompute and training.recompute_layers in place where they are left open.

    Args:
        text_config: of the model, from transformers; not read with hardware.profile=cpu.
    """
    training = config.training
    if training.recompute != AUTO:
        return []
    mode, number, reason = _choose(config, facts, text_config)
    found = [Derivation(key="training.recompute", value=mode, reason=reason)]
    training.recompute = mode
    if number:
        training.recompute_layers = number
        found.append(Derivation(key="training.recompute_layers", value=number, reason=reason))
    return found


def derive_dense_copies(config: RunConfig, facts: HardwareFacts, text_config: Any) -> list[Derivation]:
    """Fill engine.dense_copies in place where it is left open.

    Args:
        text_config: of the model, from transformers; read where there is something to copy.

    Raises:
        ValueError: it is set where there is nothing to copy or to merge.
    """
    engine, model = config.engine, config.model
    if config.stage != "rl":
        return []
    is_vllm = engine.kind == "vllm" and facts.device == "cuda"
    can_copy = is_vllm and model.quantization == "nf4"
    has_adapter = config.training.parameters != ALL_WEIGHTS
    can_merge = is_vllm and model.quantization in ("nf4", "none") and model.dtype == "bfloat16" and has_adapter
    needs = {"base": (can_copy, "nf4"), "merged": (can_merge, "nf4 or none, model.dtype=bfloat16, an adapter trained")}
    if engine.dense_copies in needs and not needs[engine.dense_copies][0]:
        raise ValueError(
            f"engine.dense_copies is {engine.dense_copies}, which needs engine=vllm on a GPU and model.quantization="
            f"{needs[engine.dense_copies][1]}; found engine={engine.kind} on {facts.device}, "
            f"model.quantization={model.quantization}, model.dtype={model.dtype}, "
            f"training.parameters={config.training.parameters}"
        )
    if engine.dense_copies is not None:
        return []
    engine.dense_copies, reason = (
        "none",
        "only vLLM on a GPU has them, of an NF4 base or with an adapter in bfloat16",
    )
    if can_copy or can_merge:
        shape = LayerShape.from_config(text_config)
        dense = shape.num_layers * shape.linear_weights * item_bytes(config) / GIB
        left = memory_room(config, facts, text_config) / GIB - (engine.kv_cache_gib or 0.0)
        if dense <= left:
            engine.dense_copies = "merged" if can_merge else "base"
        reason = f"take {dense:.1f} GiB while it generates, {max(0.0, left):.1f} GiB are left beside base and KV cache"
    return [Derivation(key="engine.dense_copies", value=engine.dense_copies, reason=reason)]


def _choose(config: RunConfig, facts: HardwareFacts, text_config: Any) -> tuple[str, int, str]:
    if config.hardware.profile == "cpu":
        return NONE, 0, "cpu profile: time is scarcer than memory"
    if config.training.parameters == ALL_WEIGHTS:
        return (
            FULL,
            0,
            "training.parameters is full: plain layers keep the most, and how much is not predicted",
        )
    if text_config.model_type not in PATCHED_FAMILIES:
        return NONE, 0, f"memory is not predicted for {text_config.model_type} models"
    shape = LayerShape.from_config(text_config)
    tokens = config.training.tokens_per_microbatch or 1
    item = item_bytes(config)
    available = memory_room(config, facts, text_config) - backward_bytes(shape, tokens, item)
    mode, number = choose_recompute(shape, tokens, item, available)
    needed = kept_bytes(shape, NONE, 0, tokens, item) / GIB
    left = f"{max(0, available) / GIB:.1f} GiB of {facts.memory_words} are left for them"
    words = f"{tokens} tokens keep {needed:.1f} GiB of activations, {left}"
    return mode, number, words


def item_bytes(config: RunConfig) -> int:
    """Of one number of activations, keys and values."""
    return 4 if config.model.dtype == "float32" else 2


def memory_room(config: RunConfig, facts: HardwareFacts, text_config: Any) -> int:
    """Bytes that a phase may take beside what is always there: base, what is trained with AdamW, vLLM's graphs.

    Negative where those alone are above 90% of the memory. An adapter is counted on all linear layers; all weights, if
    they are trained, with float32 masters.
    """
    shape = LayerShape.from_config(text_config)
    is_vllm = config.stage == "rl" and config.engine.kind == "vllm"
    num_bases = 2 if is_vllm and config.engine.share is False else 1
    base = num_bases * base_bytes(shape, text_config, item_bytes(config), quantization=config.model.quantization)
    trained = config.lora.rank * shape.num_layers * shape.adapter_width
    if config.training.parameters == "full":
        trained = base_bytes(shape, text_config, 1, quantization="none")
    reserved = (_RESERVE_GIB + (_VLLM_GIB if is_vllm else 0.0)) * GIB
    return int(_SHARE * facts.memory_gib * GIB - base - _ADAMW_BYTES * trained - reserved)


def base_bytes(shape: LayerShape, text_config: Any, item_bytes: int, *, quantization: str) -> int:
    """Bytes of the frozen weights."""
    linear = shape.num_layers * shape.linear_weights
    tables = text_config.vocab_size * shape.hidden * (1 if text_config.tie_word_embeddings else 2)
    return int(linear * _QUANTISED_BYTES.get(quantization, item_bytes) + tables * item_bytes)


def backward_bytes(shape: LayerShape, num_tokens: int, item_bytes: int) -> int:
    """The largest moment of one layer's backward pass: gradients inside the MLP, and its matrices made dense."""
    gradients = num_tokens * (shape.intermediate + 4 * shape.hidden)  # those of gate and up lie over gate and up
    return item_bytes * (gradients + 2 * shape.intermediate * shape.hidden)
