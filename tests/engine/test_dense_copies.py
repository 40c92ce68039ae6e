"""Dense copies of an engine's NF4 layers: bitsandbytes' bits, filled anew, seen by the layers; when they are made."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from rlbench.config.derive import HardwareFacts
from rlbench.config.schema import EngineConfig, ModelConfig, RunConfig
from rlbench.engine.dense_copies import DenseCopies
from rlbench.engine.vllm_worker import nf4_layers
from rlbench.models.memory import derive_dequantize

LLAMA_8B = SimpleNamespace(
    model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip


def vllm_layer(*rows: int, columns: int = 128) -> tuple[nn.Module, torch.Tensor]:
    """A layer as vLLM's loader leaves it, matrices of `rows` one below the other; and what they stand for."""
    quantized = [
        quantize_4bit(torch.randn(n, columns, dtype=torch.bfloat16), quant_type="nf4", compress_statistics=False)
        for n in rows
    ]
    layer = nn.Module()
    weight = nn.Parameter(torch.cat([packed for packed, _ in quantized]), requires_grad=False)
    ends = [0]
    for packed, _ in quantized:
        ends.append(ends[-1] + len(packed))
    weight.bnb_quant_state = {i: state for i, (_, state) in enumerate(quantized)}  # type: ignore[attr-defined]
    weight.bnb_shard_offsets = torch.tensor(ends)  # type: ignore[attr-defined]
    layer.register_parameter("weight", weight)
    return layer, torch.cat([dequantize_4bit(packed, state) for packed, state in quantized])


@pytest.fixture
def model():
    torch.manual_seed(0)
    fused, expected = vllm_layer(64, 32, 32)
    single, _ = vllm_layer(48)
    model = nn.ModuleDict({"qkv_proj": fused, "o_proj": single, "lm_head": nn.Linear(8, 8)})
    return SimpleNamespace(all=model, fused=fused, expected=expected)


def test_layers_compute_with_bitsandbytes_values(model):
    copies = DenseCopies(nf4_layers(model.all), torch.bfloat16)
    copies.fill()

    x, bias = torch.randn(3, 128, dtype=torch.bfloat16), torch.randn(128, dtype=torch.bfloat16)
    found = model.fused.quant_method.apply(model.fused, x, bias)

    assert torch.equal(found, torch.nn.functional.linear(x, model.expected, bias))
    assert copies.num_bytes == 2 * 128 * (128 + 48)


def test_only_quantised_layers_get_a_copy_and_the_bytes_stay(model):
    before = model.fused.weight.data.clone()
    layers = nf4_layers(model.all)

    DenseCopies(layers, torch.bfloat16).fill()

    assert set(layers) == {model.fused, model.all["o_proj"]}
    assert torch.equal(model.fused.weight.data, before)
    assert not any("dense" in name for name, _ in model.all.named_parameters())  # what a trainer binds is as before


def test_what_was_given_back_is_filled_anew_at_the_same_place(model):
    copies = DenseCopies(nf4_layers(model.all), torch.bfloat16)
    copy = dict(model.fused.named_buffers())["rlbench_dense"]
    copy.fill_(float("nan"))

    copies.fill()

    assert dict(model.fused.named_buffers())["rlbench_dense"].data_ptr() == copy.data_ptr()
    assert torch.equal(copy, model.expected)


def test_a_dense_model_has_nothing_to_copy():
    with pytest.raises(ValueError, match="engine.dequantize is true"):
        DenseCopies(nf4_layers(nn.Linear(8, 8)), torch.bfloat16)


def config_of(quantization: str = "nf4", kind: str = "vllm", dequantize: bool | None = None) -> RunConfig:
    config = RunConfig()
    config.model = ModelConfig(path="x", quantization=quantization, dtype="bfloat16")
    config.engine = EngineConfig(kind=kind, kv_cache_gib=16.0, dequantize=dequantize)
    return config


def facts_of(memory_gib: float) -> HardwareFacts:
    return HardwareFacts(device="cuda", device_name="GPU", num_cores=1, memory_gib=memory_gib, matmul_gflops={},
                         vllm_problem="")  # fmt: skip


@pytest.mark.parametrize(("memory_gib", "expected"), [(79.0, True), (39.0, False)])
def test_a_base_is_made_dense_where_there_is_room_beside_the_kv_cache(memory_gib, expected):
    config = config_of()

    (derivation,) = derive_dequantize(config, facts_of(memory_gib), LLAMA_8B)

    assert config.engine.dequantize is expected
    assert (derivation.key, derivation.value) == ("engine.dequantize", expected)
    assert "takes 13.0 GiB" in derivation.reason  # 32 layers of 218,103,808 numbers in 2 bytes


def test_what_the_user_said_stays():
    config = config_of(dequantize=False)

    assert derive_dequantize(config, facts_of(79.0), LLAMA_8B) == []
    assert config.engine.dequantize is False


@pytest.mark.parametrize(("quantization", "kind"), [("none", "vllm"), ("nf4", "hf")])
def test_nothing_to_dequantise_is_refused_if_asked_for_and_false_otherwise(quantization, kind):
    with pytest.raises(ValueError, match=r"engine.dequantize is true, .* engine=vllm and model.quantization=nf4"):
        derive_dequantize(config_of(quantization, kind, dequantize=True), facts_of(79.0), LLAMA_8B)

    config = config_of(quantization, kind)
    derive_dequantize(config, facts_of(79.0), LLAMA_8B)
    assert config.engine.dequantize is False
