"""A transformers model bound to an engine's fused tensors: equal logits, no byte of its own, clear refusals."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlbench.config.schema import LoraConfig
from rlbench.models.base import load_base, share_base
from rlbench.models.fp8_linear import Fp8Linear
from rlbench.models.lora import add_lora
from rlbench.models.nf4_linear import Nf4Linear
from rlbench.models.shared_base import EngineWeight, bind_base
from rlbench_kernels import FP8, quantize_fp8

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama, tied head": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None, tie_word_embeddings=False),
    "qwen2, biases": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3, norms of q and k": Qwen3Config(**SIZES, tie_word_embeddings=False),
    "gemma2": Gemma2Config(**SIZES, sliding_window=8),
    "gemma3, two rotations": Gemma3TextConfig(
        **SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
}
TOKENS = torch.arange(20)[None] * 4


def make(config, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():  # biases and norms that are not 0 and 1
        if parameter.ndim == 1:
            parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)) * (-1 if name.endswith("bias") else 1))
    config.save_pretrained(folder)
    return model


def as_engine_keeps_it(model) -> dict[str, EngineWeight]:
    """q, k, v and gate, up as rows of one tensor; embeddings padded to a multiple of 64 rows, as vLLM does."""
    parameters = dict(model.named_parameters())  # a tied lm_head is not among them
    weights = {}
    for name, parameter in parameters.items():
        module, _, kind = name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        if leaf in ("k_proj", "v_proj", "up_proj"):
            continue
        fused = {"q_proj": ("qkv_proj", "q_proj k_proj v_proj"), "gate_proj": ("gate_up_proj", "gate_proj up_proj")}
        if leaf in fused:
            target, parts = fused[leaf]
            name = f"{parent}.{target}.{kind}"
            parameter = torch.cat([parameters[f"{parent}.{part}.{kind}"] for part in parts.split()])
        elif leaf in ("embed_tokens", "lm_head"):
            parameter = torch.cat([parameter, torch.full((128 - len(parameter), parameter.shape[1]), 7.0)])
        weights[name] = EngineWeight(parameter.detach().clone())
    return weights


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_equal_and_every_parameter_is_the_engines(name, tmp_path):
    original = make(CONFIGS[name], tmp_path)
    weights = as_engine_keeps_it(original)

    bound = bind_base(str(tmp_path), weights, dtype=torch.float32)

    with torch.no_grad():
        assert torch.equal(bound(TOKENS).logits, original(TOKENS).logits)
    storages = {weight.tensor.untyped_storage().data_ptr() for weight in weights.values()}
    assert {p.untyped_storage().data_ptr() for p in bound.parameters()} == storages
    assert not any(p.requires_grad for p in bound.parameters())


def test_a_change_of_the_engines_tensor_is_a_change_of_the_trainers(tmp_path):
    weights = as_engine_keeps_it(make(CONFIGS["llama"], tmp_path))
    bound = share_base(bind_base(str(tmp_path), weights, dtype=torch.float32))

    weights["model.layers.1.mlp.gate_up_proj.weight"].tensor[128 + 3, 5] = 11.0

    assert bound.get_submodule("model.layers.1.mlp.up_proj").weight[3, 5] == 11.0


def quantised(weights, model):
    """NF4 by bitsandbytes, part by part and one after the other, as vLLM keeps it."""
    functional = pytest.importorskip("bitsandbytes").functional
    result = {}
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            result[name] = EngineWeight(weight.tensor.bfloat16())
            continue
        parent = name.rsplit(".", 2)[0]
        fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
        parts = fused.get(name.split(".")[-2], [name.split(".")[-2]])
        sizes = [model.get_submodule(f"{parent}.{part}").out_features for part in parts]
        pairs = [functional.quantize_4bit(t.bfloat16(), quant_type="nf4") for t in weight.tensor.split(sizes)]
        joined = torch.cat([packed for packed, _ in pairs])
        ends = torch.tensor([len(packed) for packed, _ in pairs]).cumsum(0).tolist()
        views = [joined[end - len(packed) : end] for end, (packed, _) in zip(ends, pairs, strict=True)]
        result[name] = EngineWeight(joined, tuple((v, state) for v, (_, state) in zip(views, pairs, strict=True)))
    return result


def in_fp8(weights, padding=0):
    """As vLLM keeps an FP8 matrix: codes transposed, [in, out], one scale a row; optionally padded at both ends."""
    result = {}
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            result[name] = EngineWeight(weight.tensor.bfloat16())
            continue
        quantised = quantize_fp8(weight.tensor.bfloat16())
        codes = torch.nn.functional.pad(quantised.codes.view(torch.uint8), (0, padding, 0, padding), value=1).view(FP8)
        result[name] = EngineWeight(codes.T)
        scale = torch.nn.functional.pad(quantised.scale, (0, 0, 0, padding), value=1.0)
        result[f"{name}_scale"] = EngineWeight(scale)
    return result


def dense_twin(original, bound):
    """A plain bfloat16 model with the dequantised weights of `bound`."""
    for parameter in original.parameters():
        parameter.data = parameter.data.bfloat16()  # not .to(): the rotary buffers stay float32, as when loaded
    for path, module in bound.named_modules():
        if isinstance(module, Nf4Linear | Fp8Linear):
            original.get_submodule(path).weight.data = module.dense_weight()
    return original


@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_fp8_computes_with_the_dequantised_weights_and_holds_only_the_engines_bytes(name, padding, tmp_path):
    original = make(CONFIGS[name], tmp_path)
    dense_weights = as_engine_keeps_it(original)
    weights = in_fp8(dense_weights, padding)

    bound = bind_base(str(tmp_path), weights, dtype=torch.bfloat16)

    for path, module in bound.named_modules():
        if path.endswith("_proj"):  # exact, against what the engine was given
            exact = quantize_fp8(original.get_submodule(path).weight.bfloat16())
            assert torch.equal(module.fp8.codes.float(), exact.codes.float()) and module.fp8.codes.stride(1) == 1
            assert torch.equal(module.dense_weight(), (exact.codes.float() * exact.scale).bfloat16())
    dense = dense_twin(original, bound)
    with torch.no_grad():
        assert torch.equal(bound(TOKENS).logits, dense(TOKENS).logits)
    storages = {weight.tensor.untyped_storage().data_ptr() for weight in weights.values()}
    assert {p.untyped_storage().data_ptr() for p in bound.parameters()} == storages
    assert {p.untyped_storage().data_ptr() for p in share_base(bound).parameters()} == storages


UP = "model.layers.1.mlp.gate_up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({UP: EngineWeight(w[UP].tensor.T)}), r"\(256, 64\) .*and scales \(256, 1\)"),
        (lambda w: w.update({UP: EngineWeight(torch.zeros(4, 1024, dtype=torch.int32))}), r"torch.int32 \(4, 1024\)"),
        (lambda w: w.update({UP: EngineWeight(w[UP].tensor.contiguous())}), r"with strides \(256, 1\)"),
        (lambda w: w.pop(f"{UP}_scale"), "and scales None"),
        (lambda w: w.update({f"{UP}_scale": EngineWeight(torch.ones(1))}), r"and scales \(1,\)"),
    ],
)
def test_an_fp8_layout_that_is_not_known_is_refused_with_the_way_out(change, message, tmp_path):
    weights = in_fp8(as_engine_keeps_it(make(CONFIGS["llama"], tmp_path)))
    change(weights)

    with pytest.raises(ValueError, match=rf"keeps model.layers.1.mlp.gate_proj as .*{message}.*engine.share=false"):
        bind_base(str(tmp_path), weights, dtype=torch.bfloat16)


def test_an_fp8_matrix_that_is_too_small_is_named(tmp_path):
    weights = in_fp8(as_engine_keeps_it(make(CONFIGS["llama"], tmp_path)))
    weights[UP] = EngineWeight(weights[UP].tensor[:, :250])
    weights[f"{UP}_scale"] = EngineWeight(weights[f"{UP}_scale"].tensor[:250])

    with pytest.raises(ValueError, match=r"up_proj has shape \(122, 64\), the config asks for \(128, 64\)"):
        bind_base(str(tmp_path), weights, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["llama", "qwen2, biases", "gemma2", "gemma3, two rotations"])
def test_nf4_computes_with_the_dequantised_weights_and_holds_only_the_engines_bytes(name, tmp_path):
    original = make(CONFIGS[name], tmp_path)
    weights = quantised(as_engine_keeps_it(original), original)

    bound = bind_base(str(tmp_path), weights, dtype=torch.bfloat16)

    dense = dense_twin(original, bound)
    with torch.no_grad():
        assert torch.equal(bound(TOKENS).logits, dense(TOKENS).logits)
    storages = {weight.tensor.untyped_storage().data_ptr() for weight in weights.values()}
    tree = share_base(bound)
    assert {p.untyped_storage().data_ptr() for p in tree.parameters()} <= storages
    held = {id(module.nf4) for module in bound.modules() if isinstance(module, Nf4Linear)}
    assert {id(module.nf4) for module in tree.modules() if isinstance(module, Nf4Linear)} == held


@pytest.mark.parametrize("quantise", [quantised, lambda weights, _: in_fp8(weights)], ids=["nf4", "fp8"])
def test_lora_over_quantised_weights_has_the_gradients_of_lora_over_the_dense_ones(quantise, tmp_path):
    original = make(CONFIGS["llama"], tmp_path)
    bound = bind_base(str(tmp_path), quantise(as_engine_keeps_it(original), original), dtype=torch.bfloat16)
    dense = dense_twin(original, bound)

    gradients = []
    for base in (bound, dense):
        model = add_lora(base, LoraConfig(rank=4), seed=0)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.fill_(0.01)
        model(TOKENS).logits.float().square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})

    assert len(gradients[0]) == 2 * 2 * 7
    for parameter_name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][parameter_name])


def test_an_architecture_without_a_table_is_refused(tmp_path):
    GemmaConfig(**SIZES).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"gemma model cannot be shared.*llama, mistral.*engine\.share=false"):
        bind_base(str(tmp_path), {}, dtype=torch.float32)


@pytest.mark.parametrize("load", [bind_base, load_base])
def test_a_model_that_sees_images_is_refused(load, tmp_path):
    Gemma3Config(architectures=["Gemma3ForConditionalGeneration"]).save_pretrained(tmp_path)
    options = {"dtype": torch.float32} | ({"device": "cpu"} if load is load_base else {"weights": {}})

    with pytest.raises(ValueError, match=r"model.path: .* holds Gemma3ForConditionalGeneration, which reads more"):
        load(str(tmp_path), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.down_proj.weight"), "no weight for model.layers.1.mlp.down_proj.weight"),
        (lambda w: w.pop("model.layers.0.self_attn.qkv_proj.bias"), "no bias for model.layers.0.self_attn.q_proj"),
        (
            lambda w: w.update({"model.norm.weight": EngineWeight(torch.ones(63))}),
            r"model.norm.weight has shape \(63,\), the config asks for \(64,\)",
        ),
        (
            lambda w: w.update({"model.norm.weight": EngineWeight(torch.ones(64, dtype=torch.bfloat16))}),
            "model.dtype is torch.float32, but the engine holds weights in torch.bfloat16",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message, tmp_path):
    weights = as_engine_keeps_it(make(CONFIGS["qwen2, biases"], tmp_path))
    change(weights)

    with pytest.raises(ValueError, match=message):
        bind_base(str(tmp_path), weights, dtype=torch.float32)
