"""Patched modules compute what transformers and PEFT compute: hidden states, gradients, adapter off; and come off."""

import pytest
import torch
from benchmarks.bench_host import operations_of

from rlbench.config.schema import LoraConfig
from rlbench.data.packing import pack
from rlbench.models.lora import unfuse_lora
from rlbench.models.patch import KernelModule, patch_model, unpatch_model
from rlbench.models.policy import Policy
from tests.models.random_base import random_base
from tests.models.test_lora import gradients, randomise
from tests.models.test_packed_attention import SAMPLES

HAS_GPU = torch.cuda.is_available()
CONFIGS = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "mistral, a window": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 2.0},  # of two layers the first has the window
    "gemma2, biases": {"sliding_window": 4, "attention_bias": True},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}


def make_policy(name: str, targets: str = "all-linear", **options) -> Policy:
    family = name.split(",")[0]
    base = random_base(family, **CONFIGS[name])
    policy = Policy(base.to(**options), LoraConfig(rank=4, alpha=8, targets=targets), seed=0)
    randomise(policy.model)
    return policy


def hidden_and_gradients(policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    (batch,) = pack(SAMPLES, tokens_per_microbatch=1000, device=policy.device)
    policy.model.zero_grad()
    hidden = policy.hidden(batch)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)).to(hidden)
    (hidden * weights).sum().backward()
    return hidden.detach(), gradients(policy.model)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,down_proj"])
def test_the_patched_model_is_pefts(name, targets):
    policy = make_policy(name, targets)
    unfuse_lora(policy.model)
    expected, expected_grads = hidden_and_gradients(policy)

    replaced = patch_model(policy._tree, name.split(",")[0])
    found, grads = hidden_and_gradients(policy)

    assert sum(replaced.values()) >= 2 * 4 + 1 - (2 if name == "llama, biases" else 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for key, grad in grads.items():
        error = (grad - expected_grads[key]).norm() / expected_grads[key].norm()
        assert error < 1e-5, f"{key}: {error}"


def test_the_reference_policy_is_the_base_under_the_patch():
    policy = make_policy("qwen3")
    (batch,) = pack(SAMPLES, tokens_per_microbatch=1000, device="cpu")
    with policy.reference():
        expected = policy.hidden(batch)
    patch_model(policy._tree, "qwen3")

    with policy.reference():
        torch.testing.assert_close(policy.hidden(batch), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(policy.hidden(batch), expected, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_a_patch_comes_off(name):
    policy = make_policy(name)
    before = [type(module) for module in policy._tree.modules()]
    expected, _ = hidden_and_gradients(policy)

    patch_model(policy._tree, name)
    assert any(isinstance(module, KernelModule) for module in policy._tree.modules())
    unpatch_model(policy._tree)

    assert [type(module) for module in policy._tree.modules()] == before
    assert torch.equal(hidden_and_gradients(policy)[0], expected)


def test_a_family_without_a_table_stays_as_it_is():
    policy = make_policy("llama")

    assert not patch_model(policy._tree, "gpt2")
    assert not any(isinstance(module, KernelModule) for module in policy._tree.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_on_the_gpu_errors_are_those_of_bfloat16(name):
    exact_policy = make_policy(name)
    unpatch_model(exact_policy._tree)
    exact, exact_grads = hidden_and_gradients(exact_policy)
    policy = make_policy(name, device="cuda", dtype=torch.bfloat16)
    assert "Attention" in policy.patched

    found, grads = hidden_and_gradients(policy)
    unpatch_model(policy._tree)
    plain, plain_grads = hidden_and_gradients(policy)

    def error(a, b):
        return float((a.float().cpu() - b).norm() / b.norm())

    # the model's large random weights make gradients of single matrices differ by several percent in bfloat16
    assert error(found, exact) < 1.3 * error(plain, exact) + 1e-3
    for key, grad in grads.items():
        assert error(grad, exact_grads[key]) < 2 * error(plain_grads[key], exact_grads[key]) + 5e-3, key


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_no_gradient_is_copied_into_zeros(name):
    """As the gradient of x[0] is, one fill and one copy of x's size: `squeeze` is a view both ways."""
    policy = make_policy(name)
    patch_model(policy._tree, name)

    operations = operations_of(lambda: hidden_and_gradients(policy))

    assert operations["aten.mm.default"] and not operations["aten.select_backward.default"]
