"""A base in NF4 without an engine: the bytes of bitsandbytes, read again, trained on, refused where it cannot be."""

import gc

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn.modules import Linear4bit

from rlbench.config.schema import LoraConfig
from rlbench.data.packing import pack
from rlbench.models.base import load_base
from rlbench.models.nf4_linear import Nf4Linear
from rlbench.models.policy import Policy
from rlbench_kernels import Nf4Weight, dequantize_nf4
from tests.models.test_lora import randomise
from tests.models.test_packed_attention import SAMPLES


@pytest.fixture(scope="module", params=["llama", "gemma2", "gemma3_text"])
def folder(request, tmp_path_factory):
    config = AutoConfig.for_model(
        request.param, vocab_size=98, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dense")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return str(path)


def nf4(path):
    return load_base(path, dtype=torch.bfloat16, device="cpu", quantization="nf4")


def test_all_linear_layers_but_the_head_hold_bitsandbytes_bytes(folder):
    dense, base = load_base(folder, dtype=torch.bfloat16, device="cpu"), nf4(folder)

    layers = {name: module for name, module in base.named_modules() if isinstance(module, Nf4Linear)}
    assert len(layers) == 2 * 7 and not isinstance(base.lm_head, Nf4Linear)
    for name, layer in layers.items():
        packed, state = quantize_4bit(dense.get_submodule(name).weight.data, quant_type="nf4", compress_statistics=True)
        assert torch.equal(layer.weight, packed)
        assert torch.equal(layer.nf4.absmax, state.absmax)
    assert torch.equal(base.model.embed_tokens.weight, dense.model.embed_tokens.weight)


def test_a_policy_trains_on_it(folder):
    policy = Policy(nf4(folder), LoraConfig(rank=4), seed=0)
    randomise(policy.model)
    (batch,) = pack(SAMPLES, tokens_per_microbatch=1000, device="cpu")

    policy.hidden(batch).float().square().sum().backward()

    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())


def test_a_checkpoint_in_nf4_keeps_its_bytes(folder, tmp_path):
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    saved = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=options, device_map={"": "cpu"}
    )
    saved.save_pretrained(tmp_path)

    base = nf4(str(tmp_path))

    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(base.get_submodule(name).weight, saved.get_submodule(name).weight.data)
    with pytest.raises(ValueError, match=r"model.quantization is none, but the checkpoint .* is quantised \(nf4\)"):
        load_base(str(tmp_path), dtype=torch.bfloat16, device="cpu")


def test_without_bitsandbytes_one_sentence_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        nf4(folder)


def test_q_k_v_and_gate_up_are_rows_of_one_matrix_and_no_byte_is_held_twice(tmp_path):
    config = AutoConfig.for_model(
        "llama", vocab_size=98, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=1, head_dim=64, initializer_range=0.2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    dense = load_base(str(tmp_path), dtype=torch.bfloat16, device="cpu")
    gc.collect()
    gc.disable()
    try:
        base = nf4(str(tmp_path))
        assert not [held for held in gc.get_objects() if isinstance(held, Linear4bit)]
    finally:
        gc.enable()

    attention, mlp = base.model.layers[0].self_attn, base.model.layers[0].mlp
    for group in ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]):
        wholes = {id(layer.nf4.whole) for layer in group}
        storages = {t.untyped_storage().data_ptr() for layer in group for t in (layer.weight, layer.nf4.packed)}
        assert len(wholes) == 1 and None not in [layer.nf4.whole for layer in group] and len(storages) == 1
        assert group[0].weight.untyped_storage().nbytes() == sum(layer.weight.nbytes for layer in group)
    for name, layer in base.named_modules():
        if isinstance(layer, Nf4Linear):
            packed, state = quantize_4bit(
                dense.get_submodule(name).weight.data, quant_type="nf4", compress_statistics=True
            )
            assert torch.equal(layer.weight, packed)
            assert torch.equal(layer.dense_weight(), dequantize_nf4(Nf4Weight.from_quant_state(packed, state)))
    assert base.model.layers[0].self_attn.o_proj.nf4.whole is None
