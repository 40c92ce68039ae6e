"""Dense copies of an engine's linear layers: right values, filled anew, seen by the layers; when they are made."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from rlbench.config.derive import HardwareFacts
from rlbench.config.schema import EngineConfig, ModelConfig, RunConfig
from rlbench.engine.dense_copies import DenseCopies
from rlbench.engine.vllm_worker import linear_layers
from rlbench.models.memory import derive_dense_copies

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
    model.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # type: ignore[assignment]
    return SimpleNamespace(all=model, fused=fused, expected=expected)


def nf4_copies(model) -> DenseCopies:
    return DenseCopies(linear_layers(model.all, only_nf4=True), torch.bfloat16)


def test_layers_compute_with_bitsandbytes_values(model):
    copies = nf4_copies(model)
    copies.fill()

    x, bias = torch.randn(3, 128, dtype=torch.bfloat16), torch.randn(128, dtype=torch.bfloat16)
    found = model.fused.quant_method.apply(model.fused, x, bias)

    assert torch.equal(found, torch.nn.functional.linear(x, model.expected, bias))
    assert copies.num_bytes == 2 * 128 * (128 + 48)
    assert copies.shapes == {"q_proj": (128, 64), "k_proj": (128, 32), "v_proj": (128, 32), "o_proj": (128, 48)}


def test_only_quantised_layers_get_a_copy_and_the_bytes_stay(model):
    before = model.fused.weight.data.clone()
    layers = linear_layers(model.all, only_nf4=True)

    DenseCopies(layers, torch.bfloat16).fill()

    assert [layer.layer for layer in layers] == [model.fused, model.all["o_proj"]]
    assert torch.equal(model.fused.weight.data, before)
    assert not any("dense" in name for name, _ in model.all.named_parameters())  # what a trainer binds is as before


def test_what_was_given_back_is_filled_anew_at_the_same_place(model):
    copies = nf4_copies(model)
    copy = dict(model.fused.named_buffers())["rlbench_dense"]
    copy.fill_(float("nan"))

    copies.fill()

    assert dict(model.fused.named_buffers())["rlbench_dense"].data_ptr() == copy.data_ptr()
    assert torch.equal(copy, model.expected)


def test_layers_behind_vllms_lora_keep_their_names(model):
    wrapped = nn.Module()
    wrapped.base_layer = model.fused
    tree = nn.ModuleDict({"qkv_proj": wrapped})
    tree.packed_modules_mapping = model.all.packed_modules_mapping

    (layer,) = linear_layers(tree, only_nf4=True)

    assert layer.layer is model.fused and layer.parts == (("q_proj", 64), ("k_proj", 32), ("v_proj", 32))


def test_dense_layers_are_copied_beside_quantised_ones_but_no_table_of_a_vocabulary(model):
    dense, table = nn.Linear(16, 24, bias=False), nn.Linear(16, 24)
    dense.output_partition_sizes, table.output_partition_sizes = [24], [24]  # type: ignore[assignment]
    table.org_vocab_size = 24  # type: ignore[assignment]
    model.all["down_proj"], model.all["lm_head"] = dense, table

    layers = linear_layers(model.all, only_nf4=False)

    assert [layer.layer for layer in layers] == [model.fused, model.all["o_proj"], dense]
    assert (layers[-1].parts, layers[-1].depth) == ((("down_proj", 24),), 16)


def test_a_fused_layer_that_is_not_in_vllms_table_is_refused(model):
    model.all.packed_modules_mapping = {}
    with pytest.raises(ValueError, match="vLLM fuses 3 matrices in qkv_proj"):
        linear_layers(model.all, only_nf4=True)


def test_a_dense_model_has_nothing_to_copy():
    with pytest.raises(ValueError, match="engine.dense_copies is set"):
        DenseCopies(linear_layers(nn.Linear(8, 8), only_nf4=True), torch.bfloat16)


def config_of(quantization="nf4", kind="vllm", dense_copies=None, dtype="bfloat16", parameters="adapter") -> RunConfig:
    config = RunConfig()
    config.model = ModelConfig(path="x", quantization=quantization, dtype=dtype)
    config.engine = EngineConfig(kind=kind, kv_cache_gib=16.0, dense_copies=dense_copies)
    config.training.parameters = parameters
    return config


def facts_of(memory_gib: float, device: str = "cuda") -> HardwareFacts:
    return HardwareFacts(device=device, device_name="GPU", num_cores=1, memory_gib=memory_gib, matmul_gflops={},
                         vllm_problem="")  # fmt: skip


@pytest.mark.parametrize(
    ("memory_gib", "quantization", "dtype", "expected"),
    [
        (79.0, "nf4", "bfloat16", "merged"),
        (79.0, "fp8", "bfloat16", "none"),
        (79.0, "none", "bfloat16", "merged"),
        (39.0, "nf4", "bfloat16", "none"),
        (49.0, "none", "bfloat16", "none"),
    ],
)
def test_layers_are_copied_where_there_is_room_beside_the_kv_cache(memory_gib, quantization, dtype, expected):
    config = config_of(quantization, dtype=dtype)

    (derivation,) = derive_dense_copies(config, facts_of(memory_gib), LLAMA_8B)

    assert config.engine.dense_copies == expected
    assert (derivation.key, derivation.value) == ("engine.dense_copies", expected)
    assert quantization == "fp8" or "take 13.0 GiB" in derivation.reason  # 32 layers of 218,103,808 numbers in 2 bytes


def test_what_the_user_said_stays():
    config = config_of(dense_copies="base")

    assert derive_dense_copies(config, facts_of(79.0), LLAMA_8B) == []
    assert config.engine.dense_copies == "base"


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="engine.dense_copies is 'merge', .* did you mean merged"):
        EngineConfig(dense_copies="merge")


@pytest.mark.parametrize(
    ("asked", "options", "device"),
    [
        ("base", {"quantization": "none"}, "cuda"),
        ("base", {"kind": "hf"}, "cuda"),
        ("base", {}, "cpu"),
        ("merged", {"kind": "hf"}, "cuda"),
        ("merged", {"quantization": "fp8"}, "cuda"),
        ("merged", {"dtype": "float32"}, "cuda"),
        ("merged", {"quantization": "none", "parameters": "full"}, "cuda"),
        ("merged", {"quantization": "none"}, "cpu"),
    ],
)
def test_what_cannot_be_copied_is_refused_if_asked_for_and_not_chosen(asked, options, device):
    with pytest.raises(ValueError, match=rf"engine.dense_copies is {asked}, which needs engine=vllm on a GPU"):
        derive_dense_copies(config_of(**options, dense_copies=asked), facts_of(79.0, device), LLAMA_8B)

    config = config_of(**options)
    derive_dense_copies(config, facts_of(79.0, device), LLAMA_8B)
    assert config.engine.dense_copies != asked
