"""What the gpu profile becomes on small and large cards, for models whose sizes are written out here."""

import re
from types import SimpleNamespace

import pytest

from rlbench.config.derive import Derivation, HardwareFacts, derive
from rlbench.config.schema import EngineConfig, RunConfig
from rlbench.models.fit import (
    _busier_tokens,
    derive_engine_memory,
    derive_sizes,
    fit_sizes,
    grow_kv_cache,
    trim_kv_cache,
)
from rlbench.models.held_models import HeldModel
from rlbench.models.layer_shape import LayerShape
from rlbench.models.memory import derive_dense_copies, derive_recompute

GIB = 2**30


def text_config(model_type, hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary, tied):
    return SimpleNamespace(
        model_type=model_type, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )  # fmt: skip


MODELS = {
    "SmolLM2-135M": text_config("llama", 576, 1536, 30, 9, 3, 64, 49152, True),
    "Qwen2.5-0.5B": text_config("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "Qwen2.5-1.5B": text_config("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    "Qwen3-4B": text_config("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "Llama-3.1-8B": text_config("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
}
# GiB of the base: published parameter counts times 2 bytes; NF4: matrices at 0.516 bytes, tables at 2.
BASE_GIB = {
    ("Qwen2.5-0.5B", "none"): 0.92, ("Qwen2.5-0.5B", "nf4"): 0.43,
    ("Qwen2.5-1.5B", "none"): 2.88, ("Qwen2.5-1.5B", "nf4"): 1.06,
    ("Qwen3-4B", "none"): 7.49, ("Qwen3-4B", "nf4"): 2.47,
    ("Llama-3.1-8B", "none"): 14.96, ("Llama-3.1-8B", "nf4"): 5.31,
}  # fmt: skip
KV_BYTES = {"Qwen2.5-0.5B": 12_288, "Qwen2.5-1.5B": 28_672, "Qwen3-4B": 147_456, "Llama-3.1-8B": 131_072}  # a token
DENSE_GIB = {"Qwen2.5-0.5B": 0.67, "Qwen2.5-1.5B": 2.44, "Qwen3-4B": 6.77, "Llama-3.1-8B": 13.0}
# Numbers that a layer keeps of a token: its input; with the MLP recomputed; everything.
KEPT = {
    "Qwen2.5-0.5B": (896, 3_840, 15_360), "Qwen2.5-1.5B": (1_536, 6_656, 27_648),
    "Qwen3-4B": (2_560, 15_360, 45_056), "Llama-3.1-8B": (4_096, 18_432, 55_296),
}  # fmt: skip


def facts_of(memory_gib, uncapped_gib=None, bf16_gflops=1e5):
    return HardwareFacts(
        device="cuda", device_name="a GPU", num_cores=8, memory_gib=memory_gib, uncapped_gib=uncapped_gib,
        matmul_gflops={"bfloat16": bf16_gflops, "float32": 1e4}, vllm_problem="",
    )  # fmt: skip


def derived(name, memory_gib, config, longest=None, **facts_options) -> dict[str, Derivation]:
    facts, shape = facts_of(memory_gib, **facts_options), MODELS[name]
    found = fit_sizes(config, facts, shape, derive(config, facts))
    found += derive_recompute(config, facts, shape)
    if longest is not None:
        found = trim_kv_cache(config, facts, shape, longest, found)
    found += derive_dense_copies(config, facts, shape)
    if longest is not None:
        found = grow_kv_cache(config, facts, shape, longest, found)
    return {d.key: d for d in found}


def config_of(quantization="none", max_tokens=1024) -> RunConfig:
    config = RunConfig()
    config.model.quantization, config.sampling.max_tokens = quantization, max_tokens
    return config


def generation_gib(name, config) -> float:
    dense = DENSE_GIB[name] if config.engine.dense_copies != "none" else 0.0
    return BASE_GIB[name, config.model.quantization] + config.engine.kv_cache_gib + dense + 1.5  # graphs


def training_gib(name, config) -> float:
    shape, tokens = MODELS[name], config.training.tokens_per_microbatch
    full, mlp, everything = KEPT[name]
    recomputed = config.training.recompute_layers or 0
    each = {"full": full, "mlp": mlp, "none": everything}[config.training.recompute]
    layers = recomputed * each + (shape.num_hidden_layers - recomputed) * everything
    layers += everything if recomputed else 0
    backward = tokens * (shape.intermediate_size + 4 * shape.hidden_size)
    backward += 2 * shape.intermediate_size * shape.hidden_size
    return BASE_GIB[name, config.model.quantization] + 2 * (tokens * layers + backward) / GIB + 1.5  # graphs


@pytest.mark.parametrize("memory_gib", [16, 24, 48, 80, 141])
@pytest.mark.parametrize(("name", "quantization"), list(BASE_GIB))
def test_both_phases_take_at_most_90_percent_of_the_card(name, quantization, memory_gib):
    config = config_of(quantization)
    if (name, quantization, memory_gib) == ("Llama-3.1-8B", "none", 16):
        with pytest.raises(ValueError, match="its base takes 15.0 GiB .* expected model.quantization=nf4 or a smaller"):
            derived(name, memory_gib, config)
        return

    derived(name, memory_gib, config, longest=1536)

    assert generation_gib(name, config) <= 0.9 * memory_gib
    assert training_gib(name, config) <= 0.9 * memory_gib
    seqs, cache, tokens = config.engine.max_num_seqs, config.engine.kv_cache_gib, config.training.tokens_per_microbatch
    assert seqs and cache and tokens and seqs >= 8 and tokens >= 2048
    assert seqs * 1024 * KV_BYTES[name] <= 4 * cache * GIB  # vLLM takes memory as completions grow


def test_a_large_card_keeps_the_profiles_sizes():
    config = config_of()
    derived("Qwen2.5-1.5B", 80.0, config)

    sizes = (config.training.tokens_per_microbatch, config.engine.max_num_seqs, config.engine.kv_cache_gib)
    assert sizes == (8192, 256, 32.0) and config.training.recompute == "none"


# ms of a layer's matmuls at 780 TFLOP/s with 8,192 tokens: 0.6, 2.0, 4.2, 9.2; GiB that they keep: 5.6, 11.8, 24.8, 27
@pytest.mark.parametrize(
    ("name", "memory_gib", "bf16_gflops", "tokens"),
    [
        ("Qwen2.5-0.5B", 139.0, 7.8e5, 32768),  # 131,072 would do; no more than were tried
        ("Qwen2.5-1.5B", 139.0, 7.8e5, 32768),  # 16,384 take 3.9 ms
        ("Qwen2.5-1.5B", 40.0, 7.8e5, 16384),  # 32,768 keep 47 GiB
        ("Qwen2.5-1.5B", 24.0, 7.8e5, 8192),
        ("Qwen2.5-1.5B", 139.0, 1.6e5, 8192),  # a slower device is busy with these
        ("Qwen3-4B", 139.0, 7.8e5, 16384),
        ("Llama-3.1-8B", 139.0, 7.8e5, 8192),
    ],
)
def test_a_small_model_takes_larger_microbatches_on_a_fast_device(name, memory_gib, bf16_gflops, tokens):
    config = config_of()
    found = derived(name, memory_gib, config, bf16_gflops=bf16_gflops)

    assert config.training.tokens_per_microbatch == tokens
    assert config.training.recompute == "none" or tokens == 8192
    assert ("than its launches on the host" in found["training.tokens_per_microbatch"].reason) == (tokens > 8192)


def test_microbatches_grow_only_as_far_as_a_larger_teachers_forward_pass_fits():
    config, shape = config_of(), MODELS["Qwen2.5-1.5B"]
    config.model.dtype, config.training.tokens_per_microbatch = "bfloat16", 8192
    room = 56 * GIB
    wide = LayerShape.from_config(text_config("llama", 2**12, 2**19, 2, 32, 8, 128, 1000, False))
    teacher = HeldModel(name="a teacher", shape=wide)

    alone, _ = _busier_tokens(config, facts_of(139.0, bf16_gflops=7.8e5), shape, room, [])
    assert alone == 32768
    assert _busier_tokens(config, facts_of(139.0, bf16_gflops=7.8e5), shape, room, [teacher]) is None


def test_microbatches_of_the_user_are_not_made_larger():
    config = config_of()
    config.training.tokens_per_microbatch = 4096
    derived("Qwen2.5-1.5B", 139.0, config, bf16_gflops=7.8e5)

    assert config.training.tokens_per_microbatch == 4096


def test_what_is_lowered_has_its_reason():
    config = config_of()
    found = derived("Llama-3.1-8B", 22.5, config, uncapped_gib=79.0)

    # 0.9 of 22.5, less 14.96 of the base, 0.70 of adapter, moments and casts, 3 of reserves: 1.59
    words = "hardware.memory_gib=22.5 (79.0 GiB are free)"
    cache, seqs, tokens = (found[k] for k in ("engine.kv_cache_gib", "engine.max_num_seqs",
                                              "training.tokens_per_microbatch"))  # fmt: skip
    assert cache.value == config.engine.kv_cache_gib == pytest.approx(1.5)
    assert cache.reason.startswith("what is left beside the base") and words in cache.reason
    hold = "chosen for 1.5 GiB of keys and values: they hold 12 completions of sampling.max_tokens, more of those"
    assert (seqs.value, seqs.reason) == (
        32,
        f"{hold} that end earlier",
    )  # at most four times as many, of 256, 128, 64, ..
    assert tokens.value == config.training.tokens_per_microbatch == 2048
    assert "8192 tokens do not fit in the 1.6 GiB beside the base" in tokens.reason and words in tokens.reason
    assert words in found["hardware.profile"].reason and words in found["training.recompute"].reason


def test_an_engine_that_takes_memory_at_once_decodes_no_more_than_fit():
    config = config_of()
    config.engine.kind = "hf"
    seqs = derived("Llama-3.1-8B", 22.5, config)["engine.max_num_seqs"]

    assert seqs.value <= int(seqs.reason.split(" hold ")[1].split()[0]) and "end earlier" not in seqs.reason


def test_what_the_user_set_stays():
    config = config_of()
    config.training.tokens_per_microbatch = 8192
    config.engine = EngineConfig(kv_cache_gib=9.0, max_num_seqs=128)
    found = derived("Llama-3.1-8B", 22.5, config, longest=1536)

    assert (config.engine.kv_cache_gib, config.engine.max_num_seqs) == (9.0, 128)
    assert config.training.tokens_per_microbatch == 8192
    assert not {"engine.kv_cache_gib", "engine.max_num_seqs", "training.tokens_per_microbatch"} & found.keys()


def test_the_kv_cache_is_not_larger_than_the_sequences_can_fill():
    config = config_of(max_tokens=64)
    found = derived("SmolLM2-135M", 139.0, config, longest=250)["engine.kv_cache_gib"]

    # 256 sequences of 16 blocks and one block more, of 16 tokens of 2 x 30 x 192 numbers of 2 bytes: 1.41 GiB
    assert found.value == config.engine.kv_cache_gib == 1.5
    assert found.reason == "256 sequences of 250 tokens fill no more"


def test_fp8_keys_and_values_take_half_the_memory():
    config = config_of(max_tokens=64)
    config.engine.kv_cache_dtype = "fp8"
    found = derived("SmolLM2-135M", 139.0, config, longest=250)["engine.kv_cache_gib"]

    assert found.value == config.engine.kv_cache_gib == 0.8  # half of 1.41 GiB, to the next 0.1


def test_twice_the_sequences_fit_with_fp8_keys_and_values():
    config = config_of()
    config.engine.kv_cache_dtype = "fp8"
    seqs = derived("Llama-3.1-8B", 22.5, config)["engine.max_num_seqs"]

    # 1.5 GiB hold 12 completions of 1,024 tokens in bfloat16
    assert (seqs.value, seqs.reason) == (
        64,
        "chosen for 1.5 GiB of FP8 keys and values: they hold 24 completions of sampling.max_tokens, more of those "
        "that end earlier",
    )


@pytest.mark.parametrize(("quantization", "expected"), [("none", "model.quantization=nf4"), ("nf4", "a smaller model")])
def test_a_base_that_leaves_no_room_is_refused_in_one_sentence(quantization, expected):
    with pytest.raises(ValueError, match=f"hardware.memory_gib=8 .* expected {expected}"):
        derived("Llama-3.1-8B", 8.0, config_of(quantization), uncapped_gib=79.0)


@pytest.mark.parametrize(
    ("name", "quantization", "memory_gib", "expected", "reason"),
    [
        (
            "Llama-3.1-8B",
            "nf4",
            22,
            10.7,
            "what is left beside the base, up to 90% of .*; less than half of what 128 seq",
        ),
        ("Llama-3.1-8B", "nf4", 80, 35.2, "half of what 256 sequences of 2248 tokens fill; given back"),  # 40% are 32
        ("Llama-3.1-8B", "nf4", 141, 35.3, "half of what 256 sequences of 2248 tokens fill; given back"),  # and 56.4
        ("Llama-3.1-8B", "nf4", 200, 50.0, "a quarter of .*, more than half of what 256 sequences of 2248 tokens fill"),
        ("Qwen2.5-1.5B", "none", 24, 7.8, "half of what 256 sequences of 2248 tokens fill; given back"),  # and 9.6
        ("Qwen2.5-1.5B", "none", 48, 12.0, "a quarter of .*, more than half of what 256 sequences of 2248 tokens fill"),
        ("Qwen2.5-1.5B", "none", 141, 15.5, "256 sequences of 2248 tokens fill no more"),
    ],
)
def test_keys_and_values_take_what_generation_leaves_idle(name, quantization, memory_gib, expected, reason):
    config, facts, shape = config_of(quantization, 2048), facts_of(memory_gib), MODELS[name]
    found = derive_sizes(config, facts, shape, derive(config, facts))
    found = {d.key: d for d in derive_engine_memory(config, facts, shape, 2248, found)}

    cache, seqs = found["engine.kv_cache_gib"], found["engine.max_num_seqs"]
    assert cache.value == config.engine.kv_cache_gib == expected
    assert re.match(reason, cache.reason)
    assert seqs.value == 256 or seqs.reason.startswith(
        "chosen for 8.8 GiB of keys and values: they hold 35 completions"
    )
    assert generation_gib(name, config) <= 0.9 * memory_gib


def test_one_sequence_of_full_length_always_fits():
    config = config_of("nf4", 2048)
    config.engine.max_num_seqs = 1
    derived("Llama-3.1-8B", 141, config, longest=400_000)

    assert config.engine.kv_cache_gib * GIB >= 400_000 * KV_BYTES["Llama-3.1-8B"]


def test_a_cache_that_the_user_set_does_not_grow():
    config = config_of("nf4", 2048)
    config.engine.kv_cache_gib = 4.0

    assert "engine.kv_cache_gib" not in derived("Llama-3.1-8B", 22, config, longest=2248)
    assert config.engine.kv_cache_gib == 4.0


def test_a_cpu_keeps_its_sizes():
    config = config_of()
    before = derive(config, facts_of(8.0))
    config.hardware.profile = "cpu"

    assert (
        fit_sizes(config, facts_of(8.0), None, before)
        == trim_kv_cache(config, facts_of(8.0), None, 10, before)
        == before
    )
    assert grow_kv_cache(config, facts_of(8.0), None, 10, before) == before


def test_a_family_that_is_not_counted_keeps_its_sizes_and_says_why():
    config, facts = config_of(), facts_of(8.0)
    # attributes as of gpt_neox: no key-value heads, no head_dim
    other = SimpleNamespace(model_type="other", hidden_size=512, num_attention_heads=8, num_hidden_layers=6)
    before = {d.key: d for d in derive(config, facts)}
    sizes = ("training.tokens_per_microbatch", "engine.max_num_seqs", "engine.kv_cache_gib")
    found = {d.key: d for d in derive_sizes(config, facts, other, list(before.values()))}

    why = (
        "memory is counted for llama, mistral, qwen2, qwen3, gemma2, gemma3_text models, not for other; "
        "`plan` measures what it takes"
    )
    assert all(found[key].value == before[key].value for key in before)
    assert [key for key in before if found[key].reason != before[key].reason] == [*sizes]
    assert all(f"{before[key].reason}; not made smaller for this card: {why}" == found[key].reason for key in sizes)
    assert (found["training.recompute"].value, found["training.recompute"].reason) == ("none", why)

    # 256 sequences of 4 blocks and one block more, of 16 tokens of 2 x 6 x 512 numbers of 2 bytes: 0.19 GiB
    trimmed = {d.key: d for d in trim_kv_cache(config, facts, other, 64, list(found.values()))}
    assert trimmed["engine.kv_cache_gib"].value == 0.2
