"""An FP8 base on one GPU: vLLM's layout, no byte of the trainer's own, the dequantised weights' gaps and gradients."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlbench.checks.weight_copies import BaseGuard
from rlbench.config.schema import LoraConfig
from rlbench.config.vllm_version import vllm_problem
from rlbench.engine.interface import EngineCorruptedError
from rlbench.models.base import load_base
from rlbench.models.fp8_linear import Fp8Linear
from rlbench.records import SamplingParams
from rlbench_kernels import FP8, linear_logprobs, quantize_fp8
from tests.engine.test_vllm_engine_gpu import MIB, gaps, prompts, randomise, scored, sync

HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_FP8, reason="needs a CUDA device of compute capability 8.9 or more"),
    pytest.mark.skipif(bool(vllm_problem("cuda")), reason=vllm_problem("cuda")),
    pytest.mark.timeout(400),
]
RANK = 16
LAYER = "model.layers.1"
FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
MAX_GAP = (
    0.18  # nats, mean; on this model a twin of vLLM on a CPU is 0.09 from the trainer, 1.15 with scales one row off
)


def save_model(folder: Path) -> Path:
    """Random weights in the shape of Qwen2.5-0.5B, four layers and 32,000 tokens; biases, and rows of very different
    scales."""
    config = AutoConfig.for_model(
        "qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=4, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=32_000, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.03,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif name.endswith("_proj.weight"):
                parameter.mul_((0.5 * torch.randn(len(parameter), 1)).exp())
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Engine, bound base, policy with a non-zero adapter, and what they cost in device memory."""
    from rlbench.engine.vllm_engine import VllmEngine
    from rlbench.models.policy import Policy
    from rlbench.models.shared_base import bind_base

    folder = str(save_model(tmp_path_factory.mktemp("qwen2")))
    engine = VllmEngine(
        folder, device="cuda", dtype="bfloat16", quantization="fp8", max_model_len=256, max_num_seqs=32,
        lora_rank=RANK, kv_cache_gib=0.5,
    )  # fmt: skip
    before = torch.cuda.memory_allocated()
    base = bind_base(folder, engine.base_weights(), dtype=torch.bfloat16)
    bound = torch.cuda.memory_allocated() - before
    policy = Policy(base, LoraConfig(rank=RANK), seed=0)
    with_policy = torch.cuda.memory_allocated() - before
    randomise(policy, 0)
    yield SimpleNamespace(
        folder=folder, engine=engine, base=base, policy=policy, bound_bytes=bound, all_bytes=with_policy,
        quantization="fp8", version=0,
    )  # fmt: skip
    engine.close()


def test_vllm_keeps_codes_transposed_with_one_scale_a_row(pair):
    weights = pair.engine.base_weights()
    for name, (inputs, outputs) in {
        "self_attn.qkv_proj": (896, 896 + 2 * 128),
        "self_attn.o_proj": (896, 896),
        "mlp.gate_up_proj": (896, 2 * 4864),
        "mlp.down_proj": (4864, 896),
    }.items():
        codes, scale = (weights[f"{LAYER}.{name}.{kind}"].tensor for kind in ("weight", "weight_scale"))
        assert codes.dtype == FP8 and codes.shape == (inputs, outputs) and codes.stride() == (1, inputs), name
        assert scale.dtype == torch.float32 and scale.shape == (outputs, 1), name
    assert weights["model.embed_tokens.weight"].tensor.dtype == torch.bfloat16


def test_the_engines_codes_are_those_that_the_trainer_would_have_made(pair):
    own = load_base(pair.folder, dtype=torch.bfloat16, device="cuda", quantization="fp8")
    layers = {name: module for name, module in pair.base.named_modules() if isinstance(module, Fp8Linear)}
    assert len(layers) == 4 * 7
    for name, layer in layers.items():
        expected = own.get_submodule(name)
        torch.testing.assert_close(layer.scale, expected.scale, rtol=1e-6, atol=0)
        assert (layer.weight != expected.weight).float().mean() < 1e-3, name  # a midpoint may round the other way
        assert torch.equal(layer.bias, expected.bias) if layer.bias is not None else expected.bias is None


def test_the_bound_base_takes_no_device_memory_and_the_policy_its_adapter_alone(pair):
    own = {w.tensor.untyped_storage().data_ptr() for w in pair.engine.base_weights().values()}
    assert {p.untyped_storage().data_ptr() for p in pair.base.parameters()} <= own
    assert pair.bound_bytes < MIB  # rotary frequencies alone
    adapter = sum(p.nbytes for p in pair.policy.parameters())
    print(f"bound {pair.bound_bytes / MIB:.3f} MiB, adapter {adapter / MIB:.2f}, all {pair.all_bytes / MIB:.2f}")
    # float32 masters, and their casts to bfloat16 in aligned buffers
    assert adapter <= pair.all_bytes < 1.6 * adapter + 2 * MIB


def test_the_engines_linear_layers_take_one_byte_a_number(pair):
    tensors = pair.engine.base_tensors()
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            assert tensor.untyped_storage().nbytes() == tensor.numel(), name


def test_engine_and_trainer_agree_on_sampled_tokens_with_an_adapter(pair):
    sync(pair)

    found = gaps(pair)

    print(f"fp8: gap mean {found.mean():.4f}, p99 {found.quantile(0.99):.4f}, max {found.max():.4f}")
    assert found.mean() < MAX_GAP


def test_the_trainer_computes_with_the_dequantised_weights(pair):
    """Values and gradients against a dense model that holds code * scale."""
    from rlbench.data.packing import pack
    from rlbench.models.policy import Policy
    from tests.models.test_packed_attention import SAMPLES

    dense = load_base(pair.folder, dtype=torch.bfloat16, device="cuda")
    for name, module in pair.base.named_modules():
        if isinstance(module, Fp8Linear):
            dense.get_submodule(name).weight.data = (module.fp8.codes.float() * module.scale).bfloat16()
    twin = Policy(dense, LoraConfig(rank=RANK), seed=0)
    randomise(twin, 0)
    randomise(pair.policy, 0)
    found = []
    for policy in (pair.policy, twin):
        (batch,) = pack(SAMPLES, tokens_per_microbatch=1000, device=policy.device)
        logprobs = linear_logprobs(policy.hidden(batch), policy.head_weight, batch.targets)[0]
        logprobs.sum().backward()
        found.append((logprobs.detach(), {name: p.grad for name, p in policy.named_parameters()}))
        for parameter in policy.parameters():
            parameter.grad = None

    (logprobs, grads), (expected, expected_grads) = found
    assert (logprobs - expected).abs().mean() < 0.04
    assert grads.keys() == expected_grads.keys() and len(grads) == 2 * 4 * 7
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).norm() < 0.1 * expected_grads[name].norm(), name


def test_the_base_survives_sleep_and_a_changed_code_or_scale_is_seen(pair):
    sync(pair)
    chosen, greedy = prompts(4), SamplingParams(max_tokens=8, temperature=0.0)
    before = pair.engine.generate(chosen, greedy, [0] * 4)
    completions = [c.token_ids for c in before]
    guard = BaseGuard(pair.engine.base_tensors(), {n: p.detach() for n, p in pair.base.named_parameters()})

    pair.engine.sleep()
    logprobs = scored(pair, chosen, completions)
    pair.engine.wake()

    assert [c.token_ids for c in pair.engine.generate(chosen, greedy, [0] * 4)] == completions
    assert logprobs.equal(scored(pair, chosen, completions))
    assert guard.changed() == []
    up = pair.base.get_submodule(f"{LAYER}.mlp.up_proj")
    for tensor, kind in ((up.weight, "weight"), (up.scale, "weight_scale")):
        saved = tensor[3, 0].clone()
        tensor[3, 0] = saved + 1
        assert guard.changed() == [f"shared {LAYER}.mlp.gate_up_proj.{kind}"]
        tensor[3, 0] = saved
    assert guard.changed() == []
    saved = up.scale.clone()
    up.scale.mul_(-1)
    with pytest.raises(EngineCorruptedError):
        pair.engine.check_canary()
    up.scale.copy_(saved)
    pair.engine.check_canary()


@pytest.mark.parametrize("shape", [(1024, 4096), (129, 300)])
def test_codes_on_the_gpu_are_those_of_the_cpu(shape):
    dense = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    here, there = quantize_fp8(dense), quantize_fp8(dense.cuda())

    assert torch.equal(there.scale.cpu(), here.scale)
    assert torch.equal(there.codes.view(torch.uint8).cpu(), here.codes.view(torch.uint8))
