"""FP8 keys and values on one GPU, on a bf16 and an FP8 base: memory, the gap to the trainer, sleep, prefixes."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from rlbench.checks.limits import MARGIN, Pair, honest_gap
from rlbench.config.schema import EngineConfig, LoraConfig, ModelConfig, RunConfig
from rlbench.config.vllm_version import vllm_problem
from rlbench.models.fit import kv_token_bytes
from rlbench.records import SamplingParams
from tests.engine.test_vllm_engine_gpu import folder, gaps, prompts, randomise, scored, sync

HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_FP8, reason="needs a CUDA device of compute capability 8.9 or more"),
    pytest.mark.skipif(bool(vllm_problem("cuda")), reason=vllm_problem("cuda")),
    pytest.mark.timeout(600),
]
KV_GIB = 1.0
__all__ = ["folder"]  # the fixture, so that it counts as used


@pytest.fixture(scope="module", params=["none", "fp8"])
def pair(request, folder) -> Iterator[SimpleNamespace]:
    """Engine with FP8 keys and values, and a policy with a non-zero adapter on its base."""
    from rlbench.engine.vllm_engine import VllmEngine
    from rlbench.models.policy import Policy
    from rlbench.models.shared_base import bind_base

    engine = VllmEngine(
        folder, device="cuda", dtype="bfloat16", quantization=request.param, max_model_len=512, max_num_seqs=64,
        lora_rank=16, kv_cache_gib=KV_GIB, kv_cache_dtype="fp8",
    )  # fmt: skip
    policy = Policy(bind_base(folder, engine.base_weights(), dtype=torch.bfloat16), LoraConfig(rank=16), seed=0)
    randomise(policy, 0)
    yield SimpleNamespace(engine=engine, policy=policy, quantization=request.param, folder=folder, version=0)
    engine.close()


def test_the_cache_holds_as_many_tokens_as_the_plan_counts(pair):
    config = RunConfig(model=ModelConfig(dtype="bfloat16"), engine=EngineConfig(kind="vllm", kv_cache_dtype="fp8"))
    token_bytes = kv_token_bytes(AutoConfig.from_pretrained(pair.folder), config)
    cache = pair.engine._llm.llm_engine.vllm_config.cache_config

    assert cache.num_gpu_blocks * cache.block_size == pytest.approx(KV_GIB * 2**30 / token_bytes, rel=0.01)


def test_engine_and_trainer_agree_on_sampled_tokens_within_the_limit_of_fp8_keys_and_values(pair):
    sync(pair)
    limit = MARGIN * honest_gap(Pair("vllm", "cuda", "bfloat16", pair.quantization, "fp8"))[0].mean

    found = gaps(pair)

    print(
        f"{pair.quantization}, FP8 keys and values: gap mean {found.mean():.4f}, p99 {found.quantile(0.99):.4f}, "
        f"max {found.max():.4f}, limit of the mean {limit:.4f}"
    )
    assert 0 < found.mean() < limit


def test_an_adapter_of_another_version_shows_as_a_gap(pair):
    sync(pair)
    honest = gaps(pair).mean()
    randomise(pair.policy, 7)  # the trainer moved on, the engine did not

    assert gaps(pair).mean() > 1.5 * honest
    sync(pair)
    assert gaps(pair).mean() < 1.5 * honest


def test_sleep_gives_the_cache_back_and_scores_stay_the_same(pair):
    sync(pair)
    chosen, greedy = prompts(4), SamplingParams(max_tokens=16, temperature=0.0)
    tokens = [c.token_ids for c in pair.engine.generate(chosen, greedy, [0] * 4)]
    engine, trainer = torch.tensor(pair.engine.score(chosen, tokens)), scored(pair, chosen, tokens)

    pair.engine.sleep()
    assert pair.engine.released_bytes() >= 0.99 * KV_GIB * 2**30
    pair.engine.wake()

    # not bit for bit: vLLM's LoRA kernels add in any order
    assert (torch.tensor(pair.engine.score(chosen, tokens)) - engine).abs().mean() < 0.06  # half of an honest gap
    assert trainer.equal(scored(pair, chosen, tokens))


def test_a_cached_prefix_gives_the_logprobs_of_one_that_was_just_computed(pair):
    sync(pair)
    chosen, sampling = prompts(8, length=96), SamplingParams(max_tokens=1)
    fresh = pair.engine.generate(chosen, sampling, list(range(8)))

    cached = pair.engine.generate(chosen, sampling, list(range(8)))

    same = [(a, b) for a, b in zip(fresh, cached, strict=True) if a.token_ids == b.token_ids]
    assert len(same) >= 6  # what is left of a prompt is computed in another batch shape: bf16 rounding alone
    differences = [abs(a.sampling_logprobs[0] - b.sampling_logprobs[0]) for a, b in same]
    assert sum(differences) / len(differences) < 0.1
