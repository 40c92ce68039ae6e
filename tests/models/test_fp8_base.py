"""A base that the trainer quantises to FP8: its bytes, the dequantised model's forward and gradients, our engine."""

import copy
import json

import pytest
import torch
from torch import nn

from rlbench.checks.trainer_logprobs import pack_sequences, trainer_logprobs
from rlbench.config.schema import LoraConfig
from rlbench.engine.hf_engine import HfEngine
from rlbench.models.base import load_base, share_base, storage_bytes
from rlbench.models.fp8_linear import Fp8Linear
from rlbench.models.lora import add_lora, unfuse_lora
from rlbench.models.patch import patch_model
from rlbench.models.policy import Policy
from rlbench.records import SamplingParams
from rlbench_kernels import FP8, dequantize_fp8, quantize_fp8
from tests.models.test_lora import gradients, randomise
from tests.models.test_patch import hidden_and_gradients

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def fp8(folder, dtype=torch.float32):
    return load_base(str(folder), dtype=dtype, device="cpu", quantization="fp8")


def dense_twin(folder, dtype=torch.float32):
    """A plain model whose linear layers hold code * scale, computed here."""
    model = load_base(str(folder), dtype=dtype, device="cpu")
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in LINEARS:
            weight = quantize_fp8(module.weight.data)
            module.weight.data = (weight.codes.float() * weight.scale).to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_linear_layers_but_the_head_hold_codes_and_a_scale_a_row(tiny_folder, dtype):
    dense, base = load_base(str(tiny_folder), dtype=dtype, device="cpu"), fp8(tiny_folder, dtype)

    layers = {name: module for name, module in base.named_modules() if isinstance(module, Fp8Linear)}
    assert len(layers) == 2 * 7 and not isinstance(base.lm_head, Fp8Linear)
    for name, layer in layers.items():
        expected = quantize_fp8(dense.get_submodule(name).weight.data)
        assert torch.equal(layer.weight, expected.codes.view(torch.uint8))
        assert torch.equal(layer.scale, expected.scale) and layer.compute_dtype == dtype
    numbers = sum(layer.weight.numel() + 4 * layer.out_features for layer in layers.values())
    tables = sum(p.nbytes for n, p in dense.named_parameters() if n.split(".")[-2] not in LINEARS)
    assert storage_bytes(base) == numbers + tables
    assert storage_bytes(base, share_base(base)) == storage_bytes(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_over_fp8_is_pefts_over_the_dequantised_weights(tiny_folder, dtype):
    token_ids = torch.randint(2, 98, (3, 11), generator=torch.Generator().manual_seed(0))
    found = []
    for base, is_fused in ((fp8(tiny_folder, dtype), True), (dense_twin(tiny_folder, dtype), False)):
        model = add_lora(base, LoraConfig(rank=4, alpha=8), seed=0)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        randomise(model)
        if not is_fused:
            unfuse_lora(model)
        logits = model(input_ids=token_ids).logits
        logits.float().square().mean().backward()
        found.append((logits.detach().float(), gradients(model)))

    (logits, grads), (expected, expected_grads) = found
    assert len(grads) == 2 * 2 * 7
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (logits - expected).norm() < tolerance * expected.norm()
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).norm() < 2 * tolerance * expected_grads[name].norm(), name


def test_kernel_modules_over_fp8_compute_the_dequantised_model(tiny_folder):
    results = []
    for base in (fp8(tiny_folder), dense_twin(tiny_folder)):
        policy = Policy(base, LoraConfig(rank=4, alpha=8), seed=0)
        randomise(policy.model)
        if base.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8:
            assert sum(patch_model(policy._tree, "llama").values()) == 2 * 5 + 1
        results.append(hidden_and_gradients(policy))

    (hidden, grads), (expected, expected_grads) = results
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_gradient_of_the_input_is_the_dequantised_weights_in_float64(tiny_folder):
    layer = fp8(tiny_folder).model.layers[0].mlp.down_proj
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))

    layer(x).backward(grad)

    exact = layer.fp8.codes.double() * layer.fp8.scale.double()
    torch.testing.assert_close(x.grad.double(), grad.double() @ exact, rtol=1e-5, atol=1e-6)


def test_our_engine_and_the_trainer_agree_on_one_fp8_base(tiny_folder):
    base = fp8(tiny_folder)
    policy = Policy(base, LoraConfig(rank=4, alpha=8), seed=0)
    randomise(policy.model)
    bytes_before = storage_bytes(base)
    engine = HfEngine(base)
    assert storage_bytes(base) == bytes_before  # fusing replaces the layers' own tensors
    engine.sync(policy.adapter(), 1)
    prompts = [[5, 6, 7], [8, 9, 10, 11], [12]]

    completions = engine.generate(prompts, SamplingParams(max_tokens=9), [0, 1, 2])

    sampled = torch.tensor([logprob for c in completions for logprob in c.sampling_logprobs])
    batch = pack_sequences(prompts, [c.token_ids for c in completions], policy.device)
    torch.testing.assert_close(trainer_logprobs(policy, batch)[0], sampled, rtol=1e-4, atol=1e-4)
    dense = Policy(load_base(str(tiny_folder), dtype=torch.float32, device="cpu"), LoraConfig(rank=4, alpha=8), seed=0)
    randomise(dense.model)
    assert (trainer_logprobs(dense, batch)[0] - sampled).abs().max() > 1e-2  # the unquantised base is another


def test_copies_use_the_same_bytes():
    layer = Fp8Linear(quantize_fp8(torch.randn(4, 6)), torch.randn(4))

    copied = copy.deepcopy(nn.Sequential(layer))[0]

    assert copied.weight is layer.weight and copied.scale is layer.scale and copied.bias is layer.bias
    layer.weight[1] = torch.full((6,), 2.0).to(FP8).view(torch.uint8)
    assert torch.equal(dequantize_fp8(copied.fp8)[1], 2 * layer.scale[1].expand(6))


@pytest.mark.parametrize(
    ("method", "wanted", "message"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8", r"is quantised \(fp8\); expected a dense"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "fp8", r"\(compressed-tensors\)"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "none", "model.quantization is none"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "fp8", r"\(nf4\)"),
    ],
)
def test_a_checkpoint_that_is_quantised_already_is_refused(tiny_folder, tmp_path, method, wanted, message):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": method}))

    with pytest.raises(ValueError, match=message):
        load_base(str(tmp_path), dtype=torch.float32, device="cpu", quantization=wanted)
