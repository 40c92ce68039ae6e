"""Gemma 2 and 3 on one GPU: the trainer computes with vLLM's own tensors, past the windows of both."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from rlbench.config.schema import LoraConfig
from rlbench.config.vllm_version import vllm_problem
from rlbench.records import SamplingParams
from tests.engine.test_vllm_engine_gpu import MIB, randomise, scored, sync
from tests.models.random_base import random_base

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(bool(vllm_problem("cuda")), reason=vllm_problem("cuda")),
    pytest.mark.timeout(600),
]
FEATURES = {
    "gemma2": {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
}
SIZES = {
    "hidden_size": 512, "intermediate_size": 1024, "head_dim": 256, "query_pre_attn_scalar": 256, "vocab_size": 4096,
    "initializer_range": 0.04, "sliding_window": 64, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture(scope="module", params=[(family, kind) for family in FEATURES for kind in ("none", "nf4")])
def pair(request, tmp_path_factory) -> Iterator[SimpleNamespace]:
    from rlbench.engine.vllm_engine import VllmEngine
    from rlbench.models.policy import Policy
    from rlbench.models.shared_base import bind_base

    family, quantization = request.param
    folder = str(tmp_path_factory.mktemp(family))
    random_base(family, **SIZES, **FEATURES[family]).bfloat16().save_pretrained(folder)
    sizes = {"max_model_len": 512, "max_num_seqs": 32, "lora_rank": 16, "kv_cache_gib": 1.0}
    engine = VllmEngine(folder, device="cuda", dtype="bfloat16", quantization=quantization, **sizes)
    before = torch.cuda.memory_allocated()
    base = bind_base(folder, engine.base_weights(), dtype=torch.bfloat16)
    bound_bytes = torch.cuda.memory_allocated() - before
    policy = Policy(base, LoraConfig(rank=16), seed=0)
    randomise(policy, 0)
    yield SimpleNamespace(engine=engine, base=base, policy=policy, bound_bytes=bound_bytes, version=0)
    engine.close()


def test_the_bound_base_takes_no_device_memory(pair):
    assert pair.bound_bytes < MIB  # rotary frequencies and the embeddings' scale
    own = {w.tensor.untyped_storage().data_ptr() for w in pair.engine.base_weights().values()}
    assert {p.untyped_storage().data_ptr() for p in pair.base.parameters()} <= own


def test_engine_and_trainer_agree_on_sampled_tokens_with_an_adapter(pair):
    sync(pair)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, 4000, (n,), generator=generator).tolist() for n in (150, 70, 40, 20) for _ in range(4)]
    completions = pair.engine.generate(prompts, SamplingParams(max_tokens=100), list(range(16)))
    sampled = torch.tensor([logprob for c in completions for logprob in c.sampling_logprobs])
    gaps = (sampled - scored(pair, prompts, [c.token_ids for c in completions])).abs()

    print(f"gap mean {gaps.mean():.4f}, p99 {gaps.quantile(0.99):.4f}, max {gaps.max():.4f}")
    assert gaps.mean() < 0.06  # nats, as of the other families
    randomise(pair.policy, 1)
    assert (sampled - scored(pair, prompts, [c.token_ids for c in completions])).abs().mean() > 2 * gaps.mean()
    randomise(pair.policy, 0)
