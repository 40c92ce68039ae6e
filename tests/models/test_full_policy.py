"""All weights trained: gradients against plain transformers, float32 masters of bfloat16, reference, save and load."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlbench.config.schema import AlgorithmConfig, OptimConfig, TrainingConfig
from rlbench.data.packing import pack
from rlbench.models.full_policy import FullPolicy, frozen_copy
from rlbench.models.patch import KernelNorm, patch_model
from rlbench.training.optim import make_optimizer
from rlbench.training.step import train_step
from tests.training.test_step import TEMPERATURE, make_samples, padded_logprobs

CONFIGS = {
    "llama": {"tie_word_embeddings": True},
    "llama, untied": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
        "attn_implementation": "eager",
    },
}
NORMS = {"llama": "LlamaRMSNorm", "qwen3": "Qwen3RMSNorm", "gemma2": "Gemma2RMSNorm"}
KL_COEF = 0.3


def make_base(name: str, dtype: torch.dtype = torch.float32):
    config = AutoConfig.for_model(
        name.split(",")[0], vocab_size=98, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
        **CONFIGS[name],
    )  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    with torch.no_grad():
        for key, parameter in base.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return base.to(dtype)


def plain_gradients(base, frozen, samples) -> dict[str, torch.Tensor]:
    """REINFORCE with a KL penalty through one padded batch, logits [B, L, V] and autograd, in plain transformers."""
    model = copy.deepcopy(base).requires_grad_(True)
    length = max(len(s.prompt_token_ids) + len(s.token_ids) for s in samples)
    rows = [[*s.prompt_token_ids, *s.token_ids] for s in samples]
    token_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    logprobs = padded_logprobs(model, token_ids, attention_mask)
    with torch.no_grad():
        reference = padded_logprobs(frozen, token_ids, attention_mask)
    count = sum(sum(s.loss_mask) for s in samples)
    loss = torch.zeros(())
    for i, s in enumerate(samples):
        start = len(s.prompt_token_ids) - 1
        for t, is_trained in enumerate(s.loss_mask):
            if is_trained:
                own, other = logprobs[i, start + t], reference[i, start + t]
                kl = torch.exp(other - own) - (other - own) - 1
                loss = loss + (-own * s.advantages[t] + KL_COEF * kl) / count
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def captured(policy, samples, budget: int) -> dict[str, torch.Tensor]:
    """Gradients of `train_step`, read by an optimizer that changes nothing."""
    found = {}

    class Capture(torch.optim.SGD):
        def step(self, closure=None):
            found.update({name: p.grad.clone() for name, p in policy.named_parameters()})

    config = AlgorithmConfig(loss="reinforce", kl_coef=KL_COEF, kl_in="loss", kl="k3", importance="off")
    batches = pack(samples, tokens_per_microbatch=budget, device="cpu")
    optimizer = Capture(policy.parameters(), lr=0.0)
    assert train_step(policy, batches, optimizer, config, temperature=TEMPERATURE, max_grad_norm=0).is_applied
    return found


def moved(base):
    """A policy that is not its reference any more."""
    frozen = frozen_copy(base)
    with torch.no_grad():
        for index, parameter in enumerate(base.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.02)
    return FullPolicy(base, frozen=frozen), frozen


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("way", ["plain", "kernel norms", "recomputed", "small microbatches"])
def test_all_gradients_are_those_of_plain_transformers(name, way):
    base = make_base(name)
    policy, frozen = moved(base)
    if way == "kernel norms":
        replaced = patch_model(policy.model, name.split(",")[0], only=KernelNorm)
        assert set(replaced) == {NORMS[name.split(",")[0]]} and not policy.has_kernel_layers
    if way == "recomputed":
        policy.set_recompute(TrainingConfig(recompute="full"))
    samples = make_samples()

    found = captured(policy, samples, budget=30 if way == "small microbatches" else 1000)

    expected = plain_gradients(base, frozen, samples)
    assert found.keys() == expected.keys() and "model.norm.weight" in found
    assert ("lm_head.weight" in found) == ("untied" in name)
    for key, grad in found.items():
        error = (grad - expected[key]).norm() / expected[key].norm()
        assert error < 1e-5, f"{key}: {error}"


def step(policy, optimizer, seed: int, budget: int = 1000) -> None:
    batches = pack(make_samples(seed), tokens_per_microbatch=budget, device="cpu")
    config = AlgorithmConfig(importance="off")
    assert train_step(policy, batches, optimizer, config, temperature=1.0, max_grad_norm=1.0).is_applied


def start(base, lr: float = 1e-3):
    policy = FullPolicy(base)
    optimizer = make_optimizer(policy.parameters(), OptimConfig(lr=lr))
    policy.follow(optimizer)
    return policy, optimizer


def test_masters_of_a_bfloat16_model_keep_what_rounding_would_lose():
    policy, optimizer = start(make_base("llama", torch.bfloat16), lr=1e-6)
    before = {name: tensor.clone() for name, tensor in policy.weights().tensors.items()}
    masters = {name: p.detach().clone() for name, p in policy.named_parameters()}
    places = {name: tensor.data_ptr() for name, tensor in policy.weights().tensors.items()}

    for seed in range(3):
        step(policy, optimizer, seed)

    after = policy.weights().tensors
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == places
    norm = "model.norm.weight"
    assert torch.equal(before[norm], after[norm])  # steps of 1e-6 are lost in bfloat16 numbers near 1
    moves = (policy._masters[norm].detach() - masters[norm]).abs()
    assert 5e-7 < float(moves.median()) < 3.5e-6
    for name, master in policy.named_parameters():
        assert torch.equal(after[name], master.bfloat16()), name


def test_gradients_of_bfloat16_microbatches_are_added_in_float32_and_freed():
    policy = FullPolicy(make_base("llama", torch.bfloat16))
    master = policy._masters["model.layers.0.mlp.down_proj.weight"]
    samples, parts = make_samples(), []
    for is_alone in (True, False):
        for i in (0, 4, 8):
            (batch,) = pack(samples[i : i + 4], tokens_per_microbatch=1000, device="cpu")
            policy.hidden(batch).float().sum().backward()
            assert all(weight.grad is None for weight in policy.model.parameters())
            if is_alone:
                parts.append(master.grad)
                master.grad = None

    assert master.grad is not None and torch.equal(master.grad, parts[0] + parts[1] + parts[2])
    assert master.grad.dtype == torch.float32
    assert not torch.equal(master.grad, master.grad.bfloat16().float())  # a sum in bfloat16 has no further bits


def test_float32_parameters_are_their_own_masters(tiny_base):
    policy, optimizer = start(copy.deepcopy(tiny_base))

    assert all(p is weight for p, weight in zip(policy.parameters(), policy.model.parameters(), strict=True))
    before = policy.weights().fingerprint()
    step(policy, optimizer, 0)
    assert policy.weights().fingerprint() != before


def test_a_policy_without_frozen_copy_has_no_reference(tiny_base):
    with pytest.raises(AssertionError, match="frozen"), FullPolicy(copy.deepcopy(tiny_base)).reference():
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_are_exact_and_transformers_reads_both_folders(tmp_path, dtype):
    policy, optimizer = start(make_base("llama", dtype))
    step(policy, optimizer, 0)
    policy.save(tmp_path / "checkpoint", "tiny")
    result = policy.save_result(tmp_path / "run", "tiny")
    other, _ = start(make_base("llama", dtype))

    other.load(tmp_path / "checkpoint")

    assert other.weights().fingerprint() == policy.weights().fingerprint()
    for (name, mine), theirs in zip(policy.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    for folder in (result, tmp_path / "checkpoint" / "model"):
        loaded = dict(AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).named_parameters())
        for name, tensor in policy.weights().tensors.items():
            assert torch.equal(loaded[name], tensor), name


def test_a_checkpoint_of_another_model_is_refused(tmp_path, tiny_base):
    start(make_base("llama"))[0].save(tmp_path, "tiny")

    with pytest.raises(ValueError, match=r"model\.safetensors has other tensors .* expected equal model.path"):
        start(copy.deepcopy(tiny_base))[0].load(tmp_path)
    with pytest.raises(ValueError, match="expected a checkpoint of a run with training.parameters=full"):
        start(copy.deepcopy(tiny_base))[0].load(tmp_path / "none")
