"""A base in NF4 without an engine: the bytes of bitsandbytes, read again, trained on, refused where it cannot be."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import quantize_4bit

from rlbench.config.schema import LoraConfig
from rlbench.data.packing import pack
from rlbench.models.base import load_base
from rlbench.models.nf4_linear import Nf4Linear
from rlbench.models.policy import Policy
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
