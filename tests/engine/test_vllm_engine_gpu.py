"""One base on one GPU: the trainer computes with vLLM's own tensors, while vLLM generates, sleeps and wakes.

RLBENCH_TEST_MODEL names another model than SmolLM2-135M-Instruct (folder, GGUF file or hub id).
"""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from rlbench.checks.trainer_logprobs import pack_sequences, trainer_logprobs
from rlbench.config.schema import LoraConfig, ModelConfig
from rlbench.config.vllm_version import vllm_problem
from rlbench.engine.interface import EngineCorruptedError
from rlbench.models.source import resolve_model
from rlbench.records import SamplingParams
from rlbench_kernels import linear_logprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(bool(vllm_problem("cuda")), reason=vllm_problem("cuda")),
    pytest.mark.timeout(600),
]
KV_GIB = 2.0
MIB = 2**20
# nats, mean over sampled tokens; the honest pair measured on an H100 is in scripts/results
MAX_GAP = 0.06


@pytest.fixture(scope="module")
def folder() -> str:
    name = os.environ.get("RLBENCH_TEST_MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
    try:
        return str(resolve_model(ModelConfig(path=name)).folder)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["nf4, none", "nf4, base", "nf4, merged", "none, none", "none, merged"])
def pair(request, folder) -> Iterator[SimpleNamespace]:
    """Engine, bound base, policy with a non-zero adapter, and what they cost in device memory."""
    from rlbench.engine.vllm_engine import VllmEngine
    from rlbench.models.policy import Policy
    from rlbench.models.shared_base import bind_base

    quantization, dense_copies = request.param.split(", ")
    engine = VllmEngine(
        folder,
        device="cuda",
        dtype="bfloat16",
        quantization=quantization,
        dense_copies=dense_copies,
        max_model_len=512,
        max_num_seqs=64,
        lora_rank=16,
        kv_cache_gib=KV_GIB,
    )
    before = torch.cuda.memory_allocated()
    base = bind_base(folder, engine.base_weights(), dtype=torch.bfloat16)
    bound = torch.cuda.memory_allocated() - before
    policy = Policy(base, LoraConfig(rank=16), seed=0)
    randomise(policy, 0)
    yield SimpleNamespace(
        engine=engine, base=base, policy=policy, bound_bytes=bound, quantization=request.param, version=0
    )
    engine.close()


def randomise(policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def sync(pair) -> None:
    pair.version += 1
    pair.engine.sync(pair.policy.adapter(), pair.version)


def prompts(count: int, length: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(10, 5000, (length,), generator=generator).tolist() for _ in range(count)]


def scored(pair, prompt_ids, completion_ids, temperature: float = 1.0) -> torch.Tensor:
    """float32 [N]: the trainer's logprobs of all completions."""
    batch = pack_sequences(prompt_ids, completion_ids, pair.policy.device)
    return trainer_logprobs(pair.policy, batch, temperatures=(temperature,))[0].cpu()


def gaps(pair) -> torch.Tensor:
    """|engine - trainer| of the logprobs of 32 x 32 sampled tokens."""
    chosen = prompts(32)
    completions = pair.engine.generate(chosen, SamplingParams(max_tokens=32), list(range(32)))
    sampled = torch.tensor([logprob for c in completions for logprob in c.sampling_logprobs])
    return (sampled - scored(pair, chosen, [c.token_ids for c in completions])).abs()


def test_the_bound_base_takes_no_device_memory(pair):
    # rotary frequencies alone
    assert pair.bound_bytes < MIB
    own = {w.tensor.untyped_storage().data_ptr() for w in pair.engine.base_weights().values()}
    assert {p.untyped_storage().data_ptr() for p in pair.base.parameters()} <= own


def test_engine_and_trainer_agree_on_sampled_tokens_with_an_adapter(pair):
    sync(pair)

    found = gaps(pair)

    print(f"{pair.quantization}: gap mean {found.mean():.4f}, p99 {found.quantile(0.99):.4f}, max {found.max():.4f}")
    assert found.mean() < MAX_GAP


def test_plain_logprobs_beside_truncated_draws_are_the_trainers(pair):
    sync(pair)
    chosen, sampling = prompts(32), SamplingParams(max_tokens=32, temperature=0.8, top_p=0.9)
    completions = pair.engine.generate(chosen, sampling, list(range(32)))
    sampled = torch.tensor([logprob for c in completions for logprob in c.sampling_logprobs])
    plain = torch.tensor([logprob for c in completions for logprob in c.plain_logprobs])
    found = (plain - scored(pair, chosen, [c.token_ids for c in completions], temperature=0.8)).abs()

    print(f"{pair.quantization}: top_p 0.9, gap mean {found.mean():.4f}, p99 {found.quantile(0.99):.4f}")
    assert found.mean() < MAX_GAP
    kept = (plain - sampled).exp()  # probability of the tokens that top_p left: at least 0.9 by its definition
    assert kept.min() > 0.9 - 5e-3 and kept.max() < 1 + 1e-3  # vLLM's search for the threshold: 0.8988 was seen
    assert kept.median() < 0.99


def test_an_adapter_of_another_version_shows_as_a_gap(pair):
    sync(pair)
    honest = gaps(pair).mean()
    randomise(pair.policy, pair.version)  # the trainer moved on, the engine did not

    assert gaps(pair).mean() > 3 * honest
    sync(pair)
    assert gaps(pair).mean() < 1.5 * honest


def test_sleep_gives_kv_memory_back_and_the_trainer_goes_on_computing(pair):
    sync(pair)
    chosen = prompts(4)
    greedy = SamplingParams(max_tokens=16, temperature=0.0)
    before = pair.engine.generate(chosen, greedy, [0] * 4)
    tokens = [c.token_ids for c in before]
    scores = torch.tensor(pair.engine.score(chosen, tokens))
    free = torch.cuda.mem_get_info()[0]

    pair.engine.sleep()

    assert pair.engine.released_bytes() > 0.99 * KV_GIB * 2**30  # whole blocks
    assert torch.cuda.mem_get_info()[0] - free > 0.95 * pair.engine.released_bytes()
    logprobs = scored(pair, chosen, [c.token_ids for c in before])
    pair.engine.wake()
    assert abs(torch.cuda.mem_get_info()[0] - free) < 256 * MIB
    # not bit for bit: vLLM's LoRA kernels add in any order, and a greedy draw near a tie then falls the other way
    assert (torch.tensor(pair.engine.score(chosen, tokens)) - scores).abs().mean() < 0.02
    assert logprobs.equal(scored(pair, chosen, [c.token_ids for c in before]))


def test_twenty_cycles_of_sleep_sync_and_wake_grow_nothing(pair):
    reserved = []
    for _ in range(20):
        pair.engine.sleep()
        sync(pair)
        pair.engine.wake()
        pair.engine.generate(prompts(8), SamplingParams(max_tokens=4), list(range(8)))
        reserved.append(torch.cuda.memory_reserved())

    assert reserved[-1] <= reserved[2]


def test_copies_that_were_changed_are_seen(pair):
    if "merged" not in pair.quantization:
        pytest.skip("only merged copies are proven after each batch")
    sync(pair)
    pair.engine.generate(prompts(2), SamplingParams(max_tokens=2), [0, 1])
    model = pair.engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    copy = next(tensor for name, tensor in model.named_buffers() if name.endswith("rlbench_dense"))
    copy[5, 7] += 1

    with pytest.raises(EngineCorruptedError, match="1 matrices that the engine sampled with"):
        pair.engine.generate(prompts(2), SamplingParams(max_tokens=2), [0, 1])

    randomise(pair.policy, pair.version)
    sync(pair)  # other weights, so the copies are written anew
    pair.engine.generate(prompts(2), SamplingParams(max_tokens=2), [0, 1])


def test_a_changed_base_weight_is_caught_when_the_engine_wakes(pair):
    weight = pair.engine.base_weights()["model.norm.weight"].tensor
    saved = weight.clone()

    pair.engine.sleep()
    weight.copy_(-saved)
    with pytest.raises(EngineCorruptedError):
        pair.engine.wake()

    weight.copy_(saved)
    pair.engine.check_canary()


def test_gradients_flow_through_the_shared_base(pair):
    batch = pack_sequences(prompts(1), [[7, 8, 9]], pair.policy.device)
    linear_logprobs(pair.policy.hidden(batch), pair.policy.head_weight, batch.targets)[0].sum().backward()

    for name, parameter in pair.policy.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        parameter.grad = None
