"""LoRA's dropout in the policy: the same in layers of PEFT, fused and patched; when it acts; which masks it takes."""

import json

import pytest
import torch
from peft import PeftModel
from torch import nn

from rlbench.config.schema import LoraConfig, TrainingConfig
from rlbench.data.packing import pack, with_next_token
from rlbench.data.supervised import given_sample
from rlbench.models.base import load_base
from rlbench.models.lora import lora_layers, unfuse_lora
from rlbench.models.lora_dropout import SeededDropout, TrainingForward, forward_of
from rlbench.models.patch import patch_model
from rlbench.models.policy import Policy
from rlbench.models.reward_model import RewardModel
from rlbench.models.value_head import Critic
from rlbench.training.sft_step import held_out_loss
from rlbench.training.step import policy_logprobs, reference_logprobs
from tests.models.random_base import random_base
from tests.models.test_lora import gradients, randomise
from tests.models.test_packed_attention import SAMPLES
from tests.models.test_patch import hidden_and_gradients

P = 0.3


def make_policy(family: str = "llama", dropout: float = P, *, seed: int = 0, **options) -> Policy:
    policy = Policy(random_base(family), LoraConfig(rank=4, alpha=8, dropout=dropout, **options), seed=seed)
    randomise(policy.model)
    return policy


def batch():
    return pack(SAMPLES, tokens_per_microbatch=1000, device="cpu")[0]


def of_step(policy: Policy, step: int = 1):
    policy.begin_step(step)
    return hidden_and_gradients(policy)


def assert_close(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for key, grad in found[1].items():
        error = (grad - expected[1][key]).norm() / expected[1][key].norm()
        assert error < 1e-5, f"{key}: {error}"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,down_proj"])
def test_patched_fused_and_pefts_own_layers_drop_the_same(family, targets):
    policy = make_policy(family, targets=targets)
    fused = of_step(policy)
    patch_model(policy._tree, family)
    patched = of_step(policy)
    plain = make_policy(family, targets=targets)
    unfuse_lora(plain.model)
    expected = of_step(plain)

    assert_close(fused, expected)
    assert_close(patched, expected)
    without = of_step(make_policy(family, 0.0, targets=targets))
    assert (expected[0] - without[0]).abs().max() > 0.05


def test_with_pefts_own_dropout_and_the_same_masks_all_is_the_same(monkeypatch):
    """PEFT's modules as `get_peft_model` makes them: nn.Dropout in training mode, its function planted."""
    expected = of_step(make_policy())
    policy = make_policy()
    forward, order = TrainingForward(0, 1, 0), []
    for name, layer in lora_layers(policy.model):
        ours = layer.lora_dropout["default"]
        assert isinstance(ours, SeededDropout) and ours.layer == name
        layer.lora_dropout["default"] = nn.Dropout(P)
        layer.lora_dropout["default"].register_forward_pre_hook(lambda *_, ours=ours: order.append(ours))

    def planted(x, p, training, *_):
        assert p == P and training
        with forward_of(forward):
            return order[-1](x)

    monkeypatch.setattr(nn.functional, "dropout", planted)
    unfuse_lora(policy.model)
    assert_close(of_step(policy), expected)
    assert len({id(ours) for ours in order}) == 2 * 7  # a mask a linear layer


def test_nothing_is_dropped_without_gradient():
    policy, without = make_policy(), make_policy(dropout=0.0)
    for each in (policy, without):
        each.begin_step(1)
    microbatch = batch()
    rows = pack([given_sample("a", [3, 4, 5, 6], [False, True, True, True])], tokens_per_microbatch=99, device="cpu")
    for value in (
        lambda p: policy_logprobs(p, microbatch, 1.0)[0],
        lambda p: reference_logprobs(p, microbatch, 1.0),
        lambda p: torch.tensor(held_out_loss(p, rows)["loss/nll"]),
    ):
        assert torch.equal(value(policy), value(without))
    expected = of_step(policy, 2)
    policy.begin_step(2)
    policy_logprobs(policy, microbatch, 1.0)  # takes no number of a training forward
    assert torch.equal(hidden_and_gradients(policy)[0], expected[0])
    assert not torch.equal(expected[0], hidden_and_gradients(without)[0])


def test_masks_are_a_function_of_seed_step_and_forward_alone():
    policy = make_policy()
    first = of_step(policy, 1)[0]
    second = hidden_and_gradients(policy)[0]
    torch.manual_seed(77)
    torch.rand(5)
    assert torch.equal(of_step(policy, 1)[0], first) and torch.equal(hidden_and_gradients(policy)[0], second)
    others = [second, of_step(policy, 2)[0], of_step(make_policy(seed=1), 1)[0]]
    assert all(not torch.equal(other, first) for other in others)
    seeds = {
        TrainingForward(run, step, index).seed(layer)
        for run in (0, 1) for step in (1, 11) for index in (0, 1) for layer in ("a", "b")
    }  # fmt: skip
    assert len(seeds) == 16 and all(0 <= seed < 2**63 for seed in seeds)
    assert TrainingForward(0, 1, 0).seed("a") == 2903720565869323631  # a resumed run of a later version needs it


@pytest.mark.parametrize("mode", ["mlp", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_recomputed_layers_give_the_same_bits(family, mode):
    policy = make_policy(family)
    patch_model(policy._tree, family)
    check_recompute(policy, mode)


def test_recomputed_layers_of_transformers_give_the_same_bits():
    check_recompute(make_policy(), "full")


def check_recompute(policy, mode):
    """Also where a second forward comes before the first one's backward pass."""

    def two_forwards():
        policy.begin_step(1)
        policy.model.zero_grad()
        first, second = policy.hidden(batch()), policy.hidden(batch())
        first.square().sum().backward()
        (3 * second.square().sum()).backward()
        return first.detach(), second.detach(), gradients(policy.model)

    *expected, expected_grads = two_forwards()
    policy.set_recompute(TrainingConfig(recompute=mode))
    *found, grads = two_forwards()

    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not torch.equal(found[0], found[1])
    for key, grad in grads.items():
        assert torch.equal(grad, expected_grads[key]), key


def test_a_rehearsal_drops_what_the_forwards_after_it_drop():
    policy = make_policy()
    policy.begin_step(4)
    with torch.no_grad():
        with policy.rehearsal():
            before = [policy.hidden(batch()) for _ in range(2)]
        clean = policy.hidden(batch())
    after = [policy.hidden(batch()).detach() for _ in range(2)]

    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(before[0], before[1]) and not torch.equal(clean, before[0])


def test_a_reward_model_and_a_critic_drop_in_their_updates_alone():
    base = random_base("llama")
    samples = [with_next_token(sample) for sample in SAMPLES]
    (microbatch,) = pack(samples, tokens_per_microbatch=1000, device="cpu")
    found = []
    for dropout in (P, 0.0):
        config = LoraConfig(rank=4, alpha=8, dropout=dropout)
        model, critic = RewardModel(base, config, seed=0), Critic(base, config, seed=0)
        for each in (model.model, model.head, critic._backbone.model, critic.head):
            randomise(each)
        with torch.no_grad():
            evaluated = [model.scores(microbatch), critic.values(microbatch)]
        found.append((evaluated, [model.scores(microbatch), critic.values(microbatch)]))
    (evaluated, updated), (expected, _) = found
    for a, b, c in zip(evaluated, expected, updated, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_saved_adapter_tells_its_dropout_and_peft_loads_it(tiny_base, tiny_folder, tmp_path):
    policy = Policy(tiny_base, LoraConfig(rank=4, alpha=8, dropout=P), seed=0)
    randomise(policy.model)
    policy.save_adapter(tmp_path, str(tiny_folder))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == P
    loaded = PeftModel.from_pretrained(
        load_base(str(tiny_folder), dtype=torch.float32, device="cpu"), str(tmp_path)
    )  # fmt: skip

    assert {m.p for m in loaded.modules() if isinstance(m, nn.Dropout)} == {P}
    with torch.no_grad():
        ours = policy.hidden(batch())
    again = Policy(tiny_base, LoraConfig(rank=4, alpha=8, init_from=str(tmp_path)), seed=1)  # its dropout may differ
    with torch.no_grad():
        assert torch.equal(again.hidden(batch()), ours)
