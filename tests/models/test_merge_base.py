"""The dense base of a merge: the numbers that were trained on, or the checkpoint's; no trace of quantisation."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from rlbench.config.schema import ModelConfig
from rlbench.models.base import load_base
from rlbench.models.fp8_linear import Fp8Linear
from rlbench.models.merge_base import ORIGINAL, TRAINED, dense_base
from rlbench.models.nf4_linear import Nf4Linear


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Float32 on the disk, with biases."""
    config = AutoConfig.for_model(
        "qwen2", vocab_size=98, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dense")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


def config_of(folder, quantization: str, dtype: str = "bfloat16") -> ModelConfig:
    return ModelConfig(path=folder, dtype=dtype, quantization=quantization)


@pytest.mark.parametrize("quantization", ["nf4", "fp8"])
def test_quantised_layers_become_what_they_stand_for_and_the_model_can_be_saved(folder, tmp_path, quantization):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    quantised = load_base(folder, dtype=torch.bfloat16, device="cpu", quantization=quantization)
    layers = {n: m for n, m in quantised.named_modules() if isinstance(m, Nf4Linear | Fp8Linear)}
    assert len(layers) == 14

    base = dense_base(folder, config_of(folder, quantization), TRAINED)

    for name, layer in layers.items():
        found = base.get_submodule(name)
        assert type(found) is torch.nn.Linear and found.weight.dtype == torch.float32
        assert torch.equal(found.weight, layer.dense_weight().float()), name
        assert (found.bias is None) == (layer.bias is None)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert torch.equal(base.lm_head.weight, quantised.lm_head.weight.float())
    base.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name)), name


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_original_is_the_checkpoint_unrounded_and_the_trained_one_is_in_the_runs_dtype(folder, quantization):
    disk = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    original = dense_base(folder, config_of(folder, quantization), ORIGINAL)
    trained = dense_base(folder, config_of(folder, quantization), TRAINED)

    for name, parameter in disk.named_parameters():
        assert torch.equal(original.get_parameter(name), parameter)
        rounded = parameter.bfloat16().float()
        is_quantised = quantization == "nf4" and name.endswith("proj.weight")
        assert torch.equal(trained.get_parameter(name), rounded) != is_quantised, name


def test_a_checkpoint_in_nf4_has_no_original(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=options, device_map={"": "cpu"}
    ).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="--base is original, but .* is in NF4 itself; expected --base trained"):
        dense_base(str(tmp_path), config_of(str(tmp_path), "nf4"), ORIGINAL)
    assert dense_base(str(tmp_path), config_of(str(tmp_path), "nf4"), TRAINED).dtype == torch.float32
