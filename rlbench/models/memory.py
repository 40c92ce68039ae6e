"""How much device memory a step takes: which layers are recomputed, whether generation has room for a dense base."""

from __future__ import annotations

from typing import Any

from rlbench.config.derive import Derivation, HardwareFacts
from rlbench.config.full_training import FULL as ALL_WEIGHTS
from rlbench.config.schema import AUTO, RunConfig
from rlbench.models.held_models import beside_words, has_reward_model, held_models
from rlbench.models.layer_shape import GIB, LayerShape, base_bytes, forward_bytes, item_bytes
from rlbench.models.names import FULL, MLP, NONE, PATCHED_FAMILIES
from rlbench.models.trained_memory import policy_bytes

_SHARE = 0.9  # of the memory that a phase may fill
_RESERVE_GIB = 1.5  # CUDA context, the head's tiles, fragmentation
_VLLM_GIB = 1.5  # its graphs and workspaces; its keys and values are given back while training


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
        left = generation_room(config, facts, text_config) / GIB - (engine.kv_cache_gib or 0.0)
        if dense <= left:
            engine.dense_copies = "merged" if can_merge else "base"
        beside = f"{engine.kv_cache_gib or 0.0:.1f} GiB of keys and values"
        reason = f"take {dense:.1f} GiB while it generates, {max(0.0, left):.1f} GiB are left beside base and {beside}"
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
        return NONE, 0, uncounted_words(text_config.model_type)
    shape = LayerShape.from_config(text_config)
    tokens = config.training.tokens_per_microbatch or 1
    item = item_bytes(config)
    largest = backward_bytes(shape, tokens, item, has_dropout=config.lora.dropout > 0)
    available = memory_room(config, facts, text_config) - largest
    mode, number = choose_recompute(shape, tokens, item, available)
    needed = kept_bytes(shape, NONE, 0, tokens, item) / GIB
    beside = beside_words(held_models(config, text_config))
    left = f"{max(0, available) / GIB:.1f} GiB of {facts.memory_words} are left for them beside the base{beside}"
    words = f"{tokens} tokens keep {needed:.1f} GiB of activations, {left}"
    return mode, number, words


def memory_room(config: RunConfig, facts: HardwareFacts, text_config: Any) -> int:
    """Bytes that a phase may take beside what is always there: base, what is trained and its optimizer, vLLM's graphs,
    and `held_models`.

    Negative where those alone are above 90% of the memory.
    """
    shape = LayerShape.from_config(text_config)
    is_vllm = config.stage == "rl" and config.engine.kind == "vllm"
    num_bases = 2 if is_vllm and config.engine.share is False else 1
    base = num_bases * base_bytes(shape, text_config, item_bytes(config), quantization=config.model.quantization)
    trained = policy_bytes(config, shape, text_config)
    reserved = (_RESERVE_GIB + (_VLLM_GIB if is_vllm else 0.0)) * GIB
    held = sum(model.num_bytes for model in held_models(config, text_config))
    return int(_SHARE * facts.memory_gib * GIB - base - trained - held - reserved)


def generation_room(config: RunConfig, facts: HardwareFacts, text_config: Any) -> int:
    """`memory_room` of the phase in which the engine holds keys and values: a reward model's forward runs in it."""
    room = memory_room(config, facts, text_config)
    if not has_reward_model(config):
        return room
    tokens = config.training.tokens_per_microbatch or 1
    return room - forward_bytes(LayerShape.from_config(text_config), tokens, item_bytes(config))


def backward_bytes(shape: LayerShape, num_tokens: int, item_bytes: int, *, has_dropout: bool = False) -> int:
    """The largest moment of one layer's backward pass: gradients inside the MLP, and its matrices made dense.

    Args:
        has_dropout: lora.dropout is above 0. Masks are drawn again, so that nothing more is kept between forward and
            backward pass; but the down projection's input is copied with its mask on, when no matrix is dense.
    """
    gradients = num_tokens * (shape.intermediate + 4 * shape.hidden)  # those of gate and up lie over gate and up
    dense, dropped = 2 * shape.intermediate * shape.hidden, num_tokens * shape.intermediate if has_dropout else 0
    return item_bytes * (gradients + max(dense, dropped))


def uncounted_words(family: str) -> str:
    """Why sizes and recomputation are not chosen for a family whose layers stay as transformers has them."""
    return (
        f"memory is counted for {', '.join(PATCHED_FAMILIES)} models, not for {family}; `plan` measures what it takes"
    )
