"""Sizes of the gpu profile made smaller where the card's memory, or hardware.memory_gib, does not hold them, and
microbatches larger where they would leave it idle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlbench.config.derive import Derivation, HardwareFacts
from rlbench.config.full_training import FULL as FULL_TRAINING
from rlbench.config.schema import RunConfig
from rlbench.models.held_models import HeldModel, beside_words, held_models
from rlbench.models.layer_shape import GIB, LayerShape, base_bytes, forward_bytes, item_bytes, key_numbers
from rlbench.models.memory import (
    backward_bytes,
    derive_dense_copies,
    derive_recompute,
    generation_room,
    kept_bytes,
    memory_room,
    uncounted_words,
)
from rlbench.models.names import FULL, NONE, PATCHED_FAMILIES

_LEAST_TOKENS = 1024  # of a microbatch
# Seconds that a layer's matmuls should take forward and backward at the measured rate. They reach half of it, and are
# to take a fifth longer than their launches do on the host, 7.7 ms (kernels/benchmarks/results/host_h200.json).
_LEAST_LAYER_S = 0.0046
_MOST_TOKENS = 32768
_LEAST_SEQS = 8  # decoded together
# Times as many sequences as fit at full length, where memory is taken as they grow: beside 35 or 42 that fit, 128 is
# quickest or near it by arithmetic unless completions are far shorter (scripts/results/simulate_seqs.json).
_PAGED = 4
_KV = "engine.kv_cache_gib"
_SEQS = "engine.max_num_seqs"
_TOKENS = "training.tokens_per_microbatch"


def derive_sizes(
    config: RunConfig, facts: HardwareFacts, text_config: Any, derived: Sequence[Derivation]
) -> list[Derivation]:
    """`fit_sizes`, and what is recomputed with these sizes: all that is known before rows are read.

    Raises:
        ValueError: as `fit_sizes`.
    """
    found = fit_sizes(config, facts, text_config, derived)
    return found + derive_recompute(config, facts, text_config)


def derive_engine_memory(
    config: RunConfig, facts: HardwareFacts, text_config: Any, longest_tokens: int, derived: Sequence[Derivation]
) -> list[Derivation]:
    """`trim_kv_cache`, whether dense copies have room beside what is left of the cache, and `grow_kv_cache`.

    Raises:
        ValueError: as `derive_dense_copies`.
    """
    found = trim_kv_cache(config, facts, text_config, longest_tokens, derived)
    found += derive_dense_copies(config, facts, text_config)
    return grow_kv_cache(config, facts, text_config, longest_tokens, found)


def fit_sizes(
    config: RunConfig, facts: HardwareFacts, text_config: Any, derived: Sequence[Derivation]
) -> list[Derivation]:
    """Lower what `derived` filled in, in place, until generation and training each take at most 90% of the memory.

    What the user set stays. Base, what is trained, its optimizer and vLLM's own memory are there in both phases.

    Args:
        config: with the values of `derived`.
        text_config: of the model, from transformers; not read with hardware.profile=cpu.
        derived: what `rlbench.config.derive.derive` returned.

    Returns:
        `derived`, with new values and reasons where they changed.

    Raises:
        ValueError: the base leaves too little room for the least sizes.
    """
    if config.hardware.profile == "cpu":
        return list(derived)
    if text_config.model_type not in PATCHED_FAMILIES:
        why = f"not made smaller for this card: {uncounted_words(text_config.model_type)}"
        return [replace(d, reason=f"{d.reason}; {why}") if d.key in (_TOKENS, _KV, _SEQS) else d for d in derived]
    found, is_open = list(derived), {d.key for d in derived}
    if _TOKENS in is_open:
        found = _replaced(config, found, {_TOKENS: _microbatch_tokens(config, facts, text_config)})
    if config.stage == "rl" and config.engine.kind in ("vllm", "hf"):
        room, token_bytes = generation_room(config, facts, text_config), kv_token_bytes(text_config, config)
        if _KV in is_open:
            found = _replaced(config, found, {_KV: _kv_cache_gib(config, facts, text_config, room, token_bytes)})
        if _SEQS in is_open:
            found = _replaced(config, found, {_SEQS: _max_num_seqs(config, room, token_bytes)})
    return found


def trim_kv_cache(
    config: RunConfig, facts: HardwareFacts, text_config: Any, longest_tokens: int, derived: Sequence[Derivation]
) -> list[Derivation]:
    """Lower a derived engine.kv_cache_gib, in place, to what max_num_seqs sequences of `longest_tokens` can fill; with
    vLLM, beyond a quarter of the memory, to half of that: completions end at different lengths.

    Args:
        text_config: of the model, from transformers; not read with hardware.profile=cpu.
        longest_tokens: of a prompt and a completion together.
        derived: as of `fit_sizes`.

    Returns:
        As of `fit_sizes`.
    """
    if config.hardware.profile == "cpu" or _KV not in {d.key for d in derived}:
        return list(derived)
    sequences = f"{config.engine.max_num_seqs} sequences of {longest_tokens} tokens"
    most, reason = _kv_bytes(config, text_config, longest_tokens), f"{sequences} fill no more"
    half, quarter = _kv_bytes(config, text_config, longest_tokens, 0.5), int(facts.memory_gib * GIB) // 4
    if config.engine.kind == "vllm" and max(half, quarter) < most:
        most, reason = max(half, quarter), f"half of what {sequences} fill; given back while training"
        if quarter > half:
            reason = f"a quarter of {facts.memory_words}, more than {reason}"
    gib = -(-most * 10 // GIB) / 10  # to the next 0.1 GiB
    if gib >= (config.engine.kv_cache_gib or 0.0):
        return list(derived)
    return _replaced(config, derived, {_KV: (gib, reason)})


def grow_kv_cache(
    config: RunConfig, facts: HardwareFacts, text_config: Any, longest_tokens: int, derived: Sequence[Derivation]
) -> list[Derivation]:
    """Give vLLM's derived engine.kv_cache_gib, in place, memory that generation would leave idle, up to half of
    what max_num_seqs sequences of `longest_tokens` can fill: below, many would be put off.

    Args:
        text_config: of the model, from transformers; read where a cache can grow.
        longest_tokens: of a prompt and a completion together.
        derived: as of `fit_sizes`, with engine.dense_copies chosen.

    Returns:
        As of `fit_sizes`.
    """
    engine, is_open = config.engine, any(d.key == _KV for d in derived)
    can_grow = config.hardware.profile == "gpu" and engine.kind == "vllm" and is_open
    if not can_grow or text_config.model_type not in PATCHED_FAMILIES:
        return list(derived)
    shape, has_copies = LayerShape.from_config(text_config), engine.dense_copies not in (None, "none")
    copies = shape.num_layers * shape.linear_weights * item_bytes(config) if has_copies else 0
    room = generation_room(config, facts, text_config) - copies
    half = _kv_bytes(config, text_config, longest_tokens, 0.5)
    gib = int(10 * min(room, half) / GIB) / 10
    if gib <= (engine.kv_cache_gib or 0.0):
        return list(derived)
    sequences = f"{engine.max_num_seqs} sequences of {longest_tokens} tokens"
    reason = f"half of what {sequences} fill; given back while training"
    if room < half:
        held = beside_words(held_models(config, text_config))
        reason = f"what is left beside the base{held}, up to 90% of {facts.memory_words}; less than {reason}"
    return _replaced(config, derived, {_KV: (gib, reason)})


def _kv_bytes(config: RunConfig, text_config: Any, longest_tokens: int, share: float = 1.0) -> int:
    """Of max_num_seqs sequences that have `share` of their length, one of them all: a block of 16 tokens is not shared
    out, and vLLM keeps one for itself."""
    blocks = -(-longest_tokens // 16)  # of one
    num_blocks = max(blocks, int(share * (config.engine.max_num_seqs or 1) * blocks))
    return 16 * (num_blocks + 1) * kv_token_bytes(text_config, config)


def kv_token_bytes(text_config: Any, config: RunConfig) -> int:
    """Bytes of one token's keys and values in all layers."""
    item = 1 if config.engine.kv_cache_dtype == "fp8" else item_bytes(config)
    return 2 * text_config.num_hidden_layers * key_numbers(text_config) * item


def _microbatch_tokens(config: RunConfig, facts: HardwareFacts, text_config: Any) -> tuple[int, str] | None:
    """The most tokens that fit with all layers recomputed; None: the profile's own."""
    room, held = memory_room(config, facts, text_config), held_models(config, text_config)
    wanted = config.training.tokens_per_microbatch or 1
    least = max(_LEAST_TOKENS, 2 * config.sampling.max_tokens) if config.stage == "rl" else _LEAST_TOKENS
    tokens = wanted
    while tokens >= min(least, wanted):
        needed = _least_training_bytes(config, LayerShape.from_config(text_config), tokens, held)
        if needed <= room:
            if tokens == wanted:
                return _busier_tokens(config, facts, text_config, room, held)
            left = f"{room / GIB:.1f} GiB beside the base{beside_words(held)}"
            return tokens, f"gpu profile: {wanted} tokens do not fit in the {left}, of {facts.memory_words}"
        tokens //= 2
    raise ValueError(_no_room(config, facts, text_config, f"{min(least, wanted)} tokens of training", needed, room))


def _busier_tokens(
    config: RunConfig, facts: HardwareFacts, text_config: Any, room: int, held: Sequence[HeldModel]
) -> tuple[int, str] | None:
    """More tokens where a small model would wait for the host's launches; none for whose sake layers are recomputed."""
    rate = 1e9 * facts.matmul_gflops.get(config.model.dtype, 0.0)
    if not rate or config.training.parameters == FULL_TRAINING:
        return None
    shape, item = LayerShape.from_config(text_config), item_bytes(config)

    def layer_s(tokens: int) -> float:
        return 4 * shape.linear_weights * tokens / rate

    def is_kept_whole(tokens: int) -> bool:
        backward = backward_bytes(shape, tokens, item, has_dropout=config.lora.dropout > 0)
        whole = kept_bytes(shape, NONE, 0, tokens, item) + backward
        return max(whole, _least_training_bytes(config, shape, tokens, held)) <= room

    wanted = tokens = config.training.tokens_per_microbatch or 1
    while layer_s(tokens) < _LEAST_LAYER_S and 2 * tokens <= _MOST_TOKENS and is_kept_whole(2 * tokens):
        tokens *= 2
    if tokens == wanted:
        return None
    return tokens, (
        f"gpu profile: a layer's matmuls of {wanted} tokens take {1e3 * layer_s(wanted):.1f} ms at {rate / 1e12:.0f} "
        "TFLOP/s, less than its launches on the host; activations of these fit without recomputation"
    )


def _least_training_bytes(config: RunConfig, shape: LayerShape, tokens: int, held: Sequence[HeldModel]) -> int:
    """Of a forward and backward pass with all layers recomputed, or of a larger teacher's forward pass."""
    item = item_bytes(config)
    kept = kept_bytes(shape, FULL, shape.num_layers, tokens, item)
    others = [forward_bytes(model.shape, tokens, item) for model in held if model.shape is not None]
    return max(kept + backward_bytes(shape, tokens, item, has_dropout=config.lora.dropout > 0), *others, 0)


def _kv_cache_gib(
    config: RunConfig, facts: HardwareFacts, text_config: Any, room: int, token_bytes: int
) -> tuple[float, str]:
    wanted = config.engine.kv_cache_gib or 0.0
    least = _LEAST_SEQS * config.sampling.max_tokens * token_bytes
    gib = min(wanted, int(10 * room / GIB) / 10)
    if gib * GIB < least:
        what = f"keys and values of {_LEAST_SEQS} sequences of sampling.max_tokens"
        raise ValueError(_no_room(config, facts, text_config, what, least, room))
    if gib == wanted:
        return gib, f"40% of {facts.memory_words}; given back while training"
    beside = beside_words(held_models(config, text_config))
    return gib, f"what is left beside the base{beside}, up to 90% of {facts.memory_words}; given back while training"


def _max_num_seqs(config: RunConfig, room: int, token_bytes: int) -> tuple[int, str] | None:
    """Of vLLM, which takes memory as completions grow and puts one off that finds none, four times what fits."""
    wanted, is_paged = config.engine.max_num_seqs or 1, config.engine.kind == "vllm"
    cache = config.engine.kv_cache_gib * GIB if is_paged and config.engine.kv_cache_gib else room
    fitting = int(cache // (token_bytes * config.sampling.max_tokens))
    seqs = wanted
    while seqs > fitting * (_PAGED if is_paged else 1) and seqs > _LEAST_SEQS:
        seqs //= 2
    what = "FP8 keys and values" if config.engine.kv_cache_dtype == "fp8" else "keys and values"
    reason = f"chosen for {cache / GIB:.1f} GiB of {what}: they hold {fitting} completions of sampling.max_tokens"
    if is_paged and seqs > fitting:
        reason += ", more of those that end earlier"
    return None if seqs == wanted else (seqs, reason)


def _no_room(config: RunConfig, facts: HardwareFacts, text_config: Any, what: str, needed: int, room: int) -> str:
    shape, kind = LayerShape.from_config(text_config), config.model.quantization
    base = base_bytes(shape, text_config, item_bytes(config), quantization=kind) / GIB
    expected = "a smaller model.path" if kind == "nf4" else "model.quantization=nf4 or a smaller model.path"
    if config.training.parameters == "full":
        expected = "training.parameters=lora or a smaller model.path"
    held = held_models(config, text_config)
    if any(model.shape is not None for model in held):
        expected += " or algorithm.teacher.model"
    beside = f"; beside it are{beside_words(held)[1:]}" if held else ""
    return (
        f"model.path does not fit: its base takes {base:.1f} GiB (model.quantization={kind}){beside}, which leaves "
        f"{max(0, room) / GIB:.1f} GiB of {facts.memory_words}, and {what} need {needed / GIB:.1f}; expected {expected}"
    )


def _replaced(
    config: RunConfig, derived: Sequence[Derivation], values: dict[str, tuple[Any, str] | None]
) -> list[Derivation]:
    found = list(derived)
    for index, derivation in enumerate(found):
        chosen = values.get(derivation.key)
        if chosen is not None:
            section, name = derivation.key.split(".")
            setattr(getattr(config, section), name, chosen[0])
            found[index] = replace(derivation, value=chosen[0], reason=chosen[1])
    return found
