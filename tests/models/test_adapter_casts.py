"""Adapters that are cast together give the bits of adapters cast one by one, and are never stale."""

import pytest
import torch

from rlbench.config.schema import TrainingConfig
from rlbench.data.packing import pack
from rlbench.models.adapter_casts import cast_together
from rlbench.models.patch import patch_model
from tests.models.test_packed_attention import SAMPLES
from tests.models.test_patch import hidden_and_gradients, make_policy


def patched(name: str, targets: str = "all-linear"):
    policy = make_policy(name, targets, dtype=torch.bfloat16)
    patch_model(policy._tree, name)
    return policy


def batch():
    return pack(SAMPLES, tokens_per_microbatch=1000, device="cpu")[0]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj,up_proj", "o_proj,down_proj"])
@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
def test_same_bits(name, targets, recompute):
    policy = patched(name, targets)
    for module in policy.model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] = 0.7  # no power of two: the product is rounded once, after the scaling
    policy.set_recompute(TrainingConfig(recompute=recompute))
    hidden, expected = hidden_and_gradients(policy)

    cast_together(policy._tree, torch.bfloat16)

    found, grads = hidden_and_gradients(policy)
    assert torch.equal(found, hidden)
    for key, grad in grads.items():
        assert torch.equal(grad, expected[key]), key


def test_every_forward_pass_sees_the_parameters_of_its_time():
    """Also what was written past autograd, as 8-bit optimizers do."""
    policy = patched("llama")
    cast_together(policy._tree, torch.bfloat16)
    with torch.no_grad():
        before = policy.hidden(batch())

    for parameter in policy.parameters():
        parameter.data.numpy()[...] *= 3

    with torch.no_grad():
        after = policy.hidden(batch())
        fresh = patched("llama")
        for mine, theirs in zip(fresh.parameters(), policy.parameters(), strict=True):
            mine.copy_(theirs)
        assert not torch.equal(after, before) and torch.equal(after, fresh.hidden(batch()))


def test_a_backward_pass_after_another_forward_pass():
    policy = patched("llama")
    _, expected = hidden_and_gradients(policy)
    cast_together(policy._tree, torch.bfloat16)
    policy.model.zero_grad()
    hidden = policy.hidden(batch())
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)).to(hidden)

    policy.hidden(batch())
    with policy.reference():
        policy.hidden(batch())

    (hidden * weights).sum().backward()
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, expected[name]), name


def test_the_reference_policy_is_the_base():
    policy = patched("llama")
    with policy.reference():
        expected = policy.hidden(batch())
    cast_together(policy._tree, torch.bfloat16)
    policy.hidden(batch())

    with policy.reference():
        assert torch.equal(policy.hidden(batch()), expected)


def test_nothing_is_cast_where_the_dtypes_are_equal():
    policy = make_policy("llama")
    patch_model(policy._tree, "llama")
    cast_together(policy._tree, torch.float32)

    policy.hidden(batch())

    assert not policy._tree.base_model._forward_pre_hooks
