"""Recomputed layers give the same gradients, bit for bit, and keep as little as the planner says."""

import pytest
import torch

from rlbench.config.derive import HardwareFacts
from rlbench.config.schema import LoraConfig, RunConfig, TrainingConfig
from rlbench.data.packing import pack
from rlbench.models.layer_shape import LayerShape, base_bytes
from rlbench.models.lora import unfuse_lora
from rlbench.models.memory import backward_bytes, choose_recompute, derive_recompute, kept_bytes
from rlbench.models.offload import HostMemory
from rlbench.models.patch import patch_model, unpatch_model
from rlbench.models.policy import Policy
from rlbench.models.recompute import FULL, set_recompute
from tests.data.test_packing import make_sample
from tests.models.random_base import random_base
from tests.models.test_packed_attention import SAMPLES
from tests.models.test_patch import hidden_and_gradients, make_policy

LLAMA_8B = LayerShape(num_layers=32, hidden=4096, query=4096, key=1024, intermediate=14336, has_qk_norm=False)


def patched_policy(name: str):
    policy = make_policy(name)
    patch_model(policy._tree, name)
    return policy


def assert_same(policy, expected):
    hidden, grads = hidden_and_gradients(policy)
    assert torch.equal(hidden, expected[0])
    for key, grad in grads.items():
        assert torch.equal(grad, expected[1][key]), key


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("mode", ["mlp", "full"])
@pytest.mark.parametrize("num_layers", [1, None])
def test_gradients_are_the_same_bits(name, mode, num_layers):
    policy = patched_policy(name)
    expected = hidden_and_gradients(policy)

    policy.set_recompute(TrainingConfig(recompute=mode, recompute_layers=num_layers))

    assert_same(policy, expected)


def test_layers_of_transformers_recompute_too_and_can_be_unpatched():
    policy = make_policy("llama")
    before = [type(module) for module in policy._tree.modules()]
    expected = hidden_and_gradients(policy)

    policy.set_recompute(TrainingConfig(recompute=FULL))

    assert_same(policy, expected)
    unpatch_model(policy._tree)
    assert [type(module) for module in policy._tree.modules()] == before


def test_layers_without_kernels_have_no_parts():
    with pytest.raises(ValueError, match="training.recompute is mlp"):
        make_policy("llama").set_recompute(TrainingConfig(recompute="mlp"))


def saved_numbers(policy, samples=SAMPLES) -> int:
    """Numbers that the forward keeps for the backward pass, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def pack_hook(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            found[storage.data_ptr()] = (storage.nbytes() // tensor.element_size(), tensor)
        return tensor

    (batch,) = pack(samples, tokens_per_microbatch=1000, device="cpu")
    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        policy.hidden(batch)
    return sum(number for number, _ in found.values())


def test_less_is_kept():
    kept = {}
    for mode in ("none", "mlp", "full"):
        policy = patched_policy("llama")
        policy.set_recompute(TrainingConfig(recompute=mode))
        kept[mode] = saved_numbers(policy)

    assert kept["full"] < 0.5 * kept["mlp"] < 0.5 * 0.8 * kept["none"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_planner_counts_what_a_layer_keeps_more_without_recomputation(family):
    """Numbers a token of one layer, by differences of tokens and of layers."""

    def saved(mode, num_layers, num_tokens):
        base = random_base(family, num_hidden_layers=num_layers, layer_types=["full_attention"] * num_layers)
        policy = Policy(base, LoraConfig(rank=1), seed=0)
        patch_model(policy._tree, family)
        policy.set_recompute(TrainingConfig(recompute=mode))
        return saved_numbers(policy, [make_sample("a", [3], [5] * num_tokens)]), LayerShape.from_config(base.config)

    def of_layer(mode):
        (a, shape), (b, _), (c, _), (d, _) = (saved(mode, n, tokens) for n in (2, 3) for tokens in (100, 200))
        return (d - c - b + a) / 100, shape.kept(mode)

    (none, planned_none), (mlp, planned_mlp) = of_layer("none"), of_layer("mlp")
    assert none - mlp == pytest.approx(planned_none - planned_mlp, abs=24)  # 22 of low-rank products and normalisers
    assert planned_none - planned_mlp == {"llama": 2 * 64 + 2 * 96, "gemma3_text": 128 + 64 + 3 * 48 + 2 * 96}[family]


def test_without_gradient_nothing_is_wrapped(monkeypatch):
    policy = patched_policy("llama")
    set_recompute(policy._tree, FULL)
    monkeypatch.setattr("rlbench.models.recompute._Recomputed", None)

    with policy.reference():
        policy.hidden(pack(SAMPLES, tokens_per_microbatch=1000, device="cpu")[0])


def test_the_planner_takes_the_cheapest_that_fits():
    tokens = 8192
    everything = kept_bytes(LLAMA_8B, "none", 0, tokens, 2)
    # 55,296 numbers a token and layer
    assert everything == 32 * tokens * 2 * (6 * 4096 + 2 * 1024 + 2 * 14336)

    assert choose_recompute(LLAMA_8B, tokens, 2, everything) == ("none", 0)
    mode, number = choose_recompute(LLAMA_8B, tokens, 2, everything // 2)
    assert mode == "mlp" and 16 < number < 32
    assert kept_bytes(LLAMA_8B, mode, number, tokens, 2) <= everything // 2
    assert kept_bytes(LLAMA_8B, mode, number - 1, tokens, 2) > everything // 2
    mode, number = choose_recompute(LLAMA_8B, tokens, 2, everything // 6)
    assert mode == "full" and number < 32
    assert choose_recompute(LLAMA_8B, tokens, 2, 0) == ("full", 32)


def test_shapes_are_read_from_a_models_config():
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "qwen3", hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=9728,
    )  # fmt: skip

    assert LayerShape.from_config(config) == LayerShape(
        num_layers=36, hidden=2560, query=4096, key=1024, intermediate=9728, has_qk_norm=True
    )


def test_dropout_copies_one_input_in_the_backward_pass_and_keeps_none():
    # gradients 16,384 x (14,336 + 4 x 4,096), two matrices of 14,336 x 4,096 or one input of 16,384 x 14,336
    assert backward_bytes(LLAMA_8B, 16384, 2) == 2 * (503_316_480 + 117_440_512)
    assert backward_bytes(LLAMA_8B, 16384, 2, has_dropout=True) == 2 * (503_316_480 + 234_881_024)
    assert backward_bytes(LLAMA_8B, 4096, 2, has_dropout=True) == backward_bytes(LLAMA_8B, 4096, 2)

    # 0.9 of 28.12 GiB, less 5.31 of the base, 0.70 of the adapter, 1.5 reserved, and 1.16 or 1.38: 16.64 or 16.42; each
    # of 24.99 or 25.13 layers, rounded up, keeps 4,096 numbers a token instead of 55,296
    for dropout, num_layers in ((0.0, 25), (0.1, 26)):
        training, _, _ = derived(28.12, dropout=dropout, tokens_per_microbatch=16384)
        assert (training.recompute, training.recompute_layers) == ("full", num_layers)


@pytest.mark.parametrize("mode", ["none", "mlp", "full", "not patched", "PEFT's own"])
def test_with_dropout_our_layers_keep_no_dropped_copy_and_pefts_do(mode):
    def saved(dropout, num_tokens):
        base = random_base("llama")
        policy = Policy(base, LoraConfig(rank=4, dropout=dropout), seed=0)
        if mode == "PEFT's own":
            unfuse_lora(policy.model)
        elif mode != "not patched":
            patch_model(policy._tree, "llama")
            policy.set_recompute(TrainingConfig(recompute=mode))
        return saved_numbers(policy, [make_sample("a", [3], [5] * num_tokens)]), LayerShape.from_config(base.config)

    (a, shape), (b, _), (c, _), (d, _) = (saved(dropout, n) for dropout in (0.0, 0.1) for n in (100, 200))
    # three copies in place of the input that q, k and v share, two of that of gate and up; one each of o's and down's
    more = shape.num_layers * (2 + 1) * shape.hidden if mode == "PEFT's own" else 0
    assert ((d - c) - (b - a)) / 100 == more


def derived(memory_gib: float, *, dropout: float = 0.0, **options):
    from transformers import AutoConfig

    config = RunConfig(stage="sft", lora=LoraConfig(dropout=dropout))
    config.hardware.profile, config.model.dtype, config.model.quantization = "gpu", "bfloat16", "nf4"
    config.training.tokens_per_microbatch = 8192
    for name, value in options.items():
        setattr(config.training, name, value)
    facts = HardwareFacts(
        device="cuda", device_name="a GPU", num_cores=8, memory_gib=memory_gib, matmul_gflops={}, vllm_problem=""
    )
    llama = AutoConfig.for_model(
        "llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    found = derive_recompute(config, facts, llama)
    return config.training, found, llama


def test_a_big_card_recomputes_nothing_and_a_small_one_as_much_as_it_must():
    training, found, _ = derived(79.0)
    assert training.recompute == "none" and "GiB of activations" in found[0].reason

    training, found, _ = derived(23.5)
    assert training.recompute in ("mlp", "full") and 0 < training.recompute_layers <= 32
    assert [d.key for d in found] == ["training.recompute", "training.recompute_layers"]


def test_what_the_user_sets_stays():
    training, found, _ = derived(23.5, recompute="full")

    assert not found and training.recompute == "full" and training.recompute_layers is None


def test_a_quantised_base_of_8b_has_the_size_it_has():
    _, _, llama = derived(79.0)

    # 6.979 billion weights in 4.127, 8 or 16 bits each and two bf16 tables of 128,256 x 4,096
    assert base_bytes(LLAMA_8B, llama, 2, quantization="nf4") / 2**30 == pytest.approx(3.354 + 1.957, rel=0.01)
    assert base_bytes(LLAMA_8B, llama, 2, quantization="fp8") / 2**30 == pytest.approx(6.5 + 1.957, rel=0.01)
    assert base_bytes(LLAMA_8B, llama, 2, quantization="none") / 2**30 == pytest.approx(13 + 1.957, rel=0.01)


class CopiesOnTheCpu:
    """Counts; what "is on its way" arrives when it is waited for, and holds nothing before."""

    def __init__(self):
        self.pending, self.sent, self.alive = [], 0, 0

    def to_host(self, tensor):
        self.sent += tensor.nbytes
        return self._later(tensor)

    def to_device(self, host, device):
        return self._later(host)

    def mark(self):
        return len(self.pending)

    def wait_on_host(self, mark):
        self._finish(mark)

    def wait_on_device(self, mark):
        if mark is not None:
            self._finish(mark)

    def _later(self, tensor):
        target = torch.full_like(tensor, float("nan"), memory_format=torch.contiguous_format)
        self.pending.append((target, tensor))
        return target

    def _finish(self, mark):
        for i, pair in enumerate(self.pending[:mark]):
            if pair is not None:
                pair[0].copy_(pair[1])
                self.pending[i] = None


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("mode", ["mlp", "full"])
def test_what_waits_in_host_memory_comes_back(name, mode, monkeypatch):
    monkeypatch.setattr("rlbench.models.offload._LEAST_BYTES", 1)
    policy = patched_policy(name)
    expected = hidden_and_gradients(policy)
    policy.set_recompute(TrainingConfig(recompute=mode))
    copies = CopiesOnTheCpu()
    memory = HostMemory(copies)
    for layer in policy._tree.base_model.layers:
        layer.keeping = memory.keeping

    for _ in range(2):
        assert_same(policy, expected)

    config, tokens = policy.model.config, len(pack(SAMPLES, tokens_per_microbatch=1000, device="cpu")[0].token_ids)
    kept = LayerShape.from_config(config).kept(mode)
    assert copies.sent >= 2 * 4 * tokens * config.num_hidden_layers * kept


def test_what_waits_may_be_asked_for_twice(monkeypatch):
    monkeypatch.setattr("rlbench.models.offload._LEAST_BYTES", 1)
    memory = HostMemory(CopiesOnTheCpu())
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    hidden, expected = x, x.detach()
    for _ in range(4):  # a square keeps its input; a transposed view has the same bytes in another order
        with memory.keeping():
            hidden = hidden * hidden + (hidden.T * hidden.T).T
    for _ in range(4):
        expected = 2 * expected**2
    assert torch.allclose(hidden, expected)

    (first,) = torch.autograd.grad(hidden.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(hidden.sum(), x)

    y = x.detach().requires_grad_()
    plain = y
    for _ in range(4):
        plain = 2 * plain**2
    (exact,) = torch.autograd.grad(plain.sum(), y)
    assert torch.allclose(first, exact) and torch.equal(first, second)


def test_offload_needs_a_gpu_and_recomputation():
    with pytest.raises(ValueError, match="which needs training.recompute=full or mlp on a GPU; found full on cpu"):
        make_policy("llama").set_recompute(TrainingConfig(recompute=FULL, offload=True))
    with pytest.raises(ValueError, match="training.offload is true, but training.recompute is none"):
        TrainingConfig(recompute="none", offload=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "options", [{"recompute": mode, "offload": offload} for mode in ("mlp", FULL) for offload in (False, True)]
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_on_the_gpu_gradients_are_those_without_recomputation(name, options, monkeypatch):
    monkeypatch.setattr("rlbench.models.offload._LEAST_BYTES", 1)
    policy = make_policy(name, device="cuda", dtype=torch.bfloat16)
    hidden, expected = hidden_and_gradients(policy)

    policy.set_recompute(TrainingConfig(**options))

    for _ in range(2):  # buffers of the first pass are used again
        found, grads = hidden_and_gradients(policy)
        assert torch.equal(found, hidden)
        for key, grad in grads.items():  # flash attention adds gradients in any order
            assert (grad - expected[key]).norm() < 0.01 * expected[key].norm(), key
