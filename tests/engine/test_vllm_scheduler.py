"""The short way of vLLM's scheduler: the same batches, tokens and blocks as vLLM's own, step by step."""

import dataclasses
import random
import zlib
from functools import cache

import numpy as np
import pytest
import torch

from rlbench.engine.vllm_requests import params
from rlbench.records import SamplingParams

pytest.importorskip("vllm", reason="vLLM is not installed")
from rlbench.engine.vllm_scheduler import HeldTokens, schedule_quickly

BLOCK = 16
CONTEXT = 160


@cache
def config(folder):
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig

    return VllmConfig(
        model_config=ModelConfig(
            model=folder, dtype="float32", seed=0, skip_tokenizer_init=True, max_model_len=CONTEXT
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=8, max_num_batched_tokens=64, max_model_len=CONTEXT, is_encoder_decoder=False
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        device_config=DeviceConfig("cpu"),
    )


def new_scheduler(folder, *, is_async, num_blocks=200, sliding_window=None, v2=True):
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
    from vllm.v1.structured_output import StructuredOutputManager

    whole = config(folder)
    whole.cache_config.num_gpu_blocks = num_blocks
    shape = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
    spec = SlidingWindowSpec(**shape, sliding_window=sliding_window) if sliding_window else FullAttentionSpec(**shape)
    cache_config = KVCacheConfig(
        num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    scheduler = (AsyncScheduler if is_async else Scheduler)(
        vllm_config=whole, kv_cache_config=cache_config, structured_output_manager=StructuredOutputManager(whole),
        block_size=BLOCK, log_stats=False,
    )  # fmt: skip
    scheduler.use_v2_model_runner = v2
    return scheduler


@cache
def block_hasher():
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    function = get_hash_fn_by_name("sha256")
    init_none_hash(function)
    return get_request_block_hasher(BLOCK, function)


def new_request(name, prompt, **options):
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.request import Request

    sampling = params(**{"seed": 1, "logprobs": 0, **options})
    sampling.output_kind = RequestOutputKind.FINAL_ONLY
    core = EngineCoreRequest(
        request_id=name, prompt_token_ids=list(prompt), mm_features=None, sampling_params=sampling,
        pooling_params=None, arrival_time=0.0, lora_request=None, cache_salt="a", data_parallel_rank=None,
    )  # fmt: skip
    return Request.from_engine_core_request(core, block_hasher())


def token_of(name, position):
    """What the model draws: a number below 100."""
    return zlib.crc32(f"{name}/{position}".encode()) % 100


def model_output(scheduler, scheduled, drawn):
    """As vLLM's workers give it: a token for each of `drawn`, the sequences whose prompt was through."""
    from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

    names = list(scheduled.num_scheduled_tokens)
    tokens, rows = [], []
    for name in names:
        request = scheduler.requests.get(name)
        position = len(request._all_token_ids) if request else 0
        tokens.append([token_of(name, position)] if name in drawn else [])
        rows.append([token_of(name, position)])
    table = np.array(rows, dtype=np.int32)
    logprobs = LogprobsLists(table, -table.astype(np.float32) / 7, np.zeros(len(names), np.int32), None)
    return ModelRunnerOutput(
        req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)}, sampled_token_ids=tokens,
        logprobs=logprobs if names else None, prompt_logprobs_dict={}, pooler_output=[],
    )  # fmt: skip


class Run:
    """A scheduler and the pipeline of steps on their way, as vLLM's engine drives it."""

    def __init__(self, scheduler, depth):
        self.scheduler, self.depth, self.pipeline = scheduler, depth, []
        self.batches, self.ended, self.told = [], {}, {}

    def step(self):
        if self.scheduler.has_requests():
            scheduled = self.scheduler.schedule()
            self.batches.append(as_values(scheduled))
            through = {n for n in scheduled.num_scheduled_tokens if not self.scheduler.requests[n].is_prefill_chunk}
            self.pipeline.append((scheduled, through))
        if len(self.pipeline) == self.depth or (self.pipeline and not self.scheduler.has_requests()):
            scheduled, through = self.pipeline.pop(0)
            output = model_output(self.scheduler, scheduled, through)
            for of_client in self.scheduler.update_from_output(scheduled, output).values():
                for one in of_client.outputs:
                    self.take(one)

    def take(self, output):
        tokens, rows = self.told.setdefault(output.request_id, ([], []))
        tokens += output.new_token_ids
        rows += output.new_logprobs.logprobs.ravel().tolist() if output.new_logprobs else []
        if output.finish_reason is not None:
            self.ended[output.request_id] = (str(output.finish_reason), output.stop_reason)

    def blocks(self):
        """Number of free blocks, and how many of each sequence are in the prefix cache."""
        manager = self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        return manager.block_pool.get_num_free_blocks(), dict(manager.num_cached_block)


def as_values(scheduled):
    """All that vLLM's workers are told, in the order they are told it."""
    values = {f.name: getattr(scheduled, f.name) for f in dataclasses.fields(scheduled)}
    values["num_scheduled_tokens"] = list(values["num_scheduled_tokens"].items())
    values["scheduled_new_reqs"] = [r.req_id for r in values["scheduled_new_reqs"]]
    return {name: repr(value) for name, value in values.items()}


def both(folder, depth, **options):
    is_async = depth == 2
    own, quick = (Run(new_scheduler(folder, is_async=is_async, **options), depth) for _ in range(2))
    assert schedule_quickly(quick.scheduler)
    return own, quick


def drive(own, quick, requests, *, events=None, limit=2000):
    """Both to their end; `events` are calls of a scheduler by the step before which they happen."""
    for run in (own, quick):
        for name, prompt, options in requests:
            run.scheduler.add_request(new_request(name, prompt, **options))
    for number in range(limit):
        for run in (own, quick):
            if events and number in events:
                events[number](run.scheduler)
            run.step()
        if own.batches[-1:] != quick.batches[-1:]:
            expected, found = own.batches[-1], quick.batches[-1]
            pytest.fail(f"step {number}: {[(k, v, found[k]) for k, v in expected.items() if v != found[k]]}")
        assert own.blocks() == quick.blocks(), f"step {number}"
        assert all(state.num_held for state in quick.scheduler._rlbench_ended.values())
        if not own.pipeline and not own.scheduler.has_requests():
            break
    assert not quick.pipeline and not quick.scheduler.has_requests()
    assert own.batches == quick.batches
    assert quick.scheduler._rlbench_held == {} == quick.scheduler._rlbench_ended
    assert own.ended == quick.ended
    for name, (tokens, rows) in own.told.items():
        if name in own.ended:
            assert quick.told[name] == (tokens, rows)
        else:  # aborted: what was held is told to nobody
            found = quick.told[name]
            assert found == (tokens[: len(found[0])], rows[: len(found[1])])


def requests_of(seed, count, *, most=60, **options):
    draw = random.Random(seed)
    shared = [draw.randrange(100) for _ in range(40)]
    for index in range(count):
        own = [draw.randrange(100) for _ in range(draw.randrange(1, 50))]
        prompt = shared[: draw.choice([0, 16, 33, 40])] + own
        yield f"{seed}-{index}", prompt, {"max_tokens": draw.randrange(1, most), **options}


@pytest.mark.parametrize("depth", [1, 2], ids=["one step after the other", "async"])
@pytest.mark.parametrize("v2", [True, False], ids=["second runner", "first runner"])
def test_batches_are_vllms_own_and_most_take_the_short_way(tiny_folder, depth, v2):
    own, quick = both(str(tiny_folder), depth, v2=v2)

    drive(own, quick, list(requests_of(1, 8)))

    assert quick.scheduler.rlbench_num_quick > 0.6 * len(quick.batches)
    assert len(quick.ended) == 8 and all(len(tokens) == len(rows) for tokens, rows in quick.told.values())


@pytest.mark.parametrize("depth", [1, 2])
def test_sequences_end_at_their_stop_tokens(tiny_folder, depth):
    own, quick = both(str(tiny_folder), depth)

    drive(own, quick, list(requests_of(2, 8, most=100, stop_token_ids=[7, 11, 13])))

    assert quick.scheduler.rlbench_num_quick > 0
    assert {reason for reason, _ in quick.ended.values()} == {"stop", "length"}
    assert {tokens[-1] for name, (tokens, _) in quick.told.items() if quick.ended[name][0] == "stop"} <= {7, 11, 13}


@pytest.mark.parametrize("depth", [1, 2])
def test_more_sequences_than_places_come_in_waves(tiny_folder, depth):
    own, quick = both(str(tiny_folder), depth)

    drive(own, quick, list(requests_of(3, 30)))

    assert quick.scheduler.rlbench_num_quick > 0.3 * len(quick.batches)


@pytest.mark.parametrize("depth", [1, 2])
def test_too_little_memory_for_all_puts_some_back(tiny_folder, depth):
    own, quick = both(str(tiny_folder), depth, num_blocks=24)

    drive(own, quick, list(requests_of(4, 12, most=90)))

    assert quick.scheduler.rlbench_num_quick > 0
    assert any(batch["preempted_req_ids"] != "set()" for batch in own.batches)


@pytest.mark.parametrize("depth", [1, 2])
def test_sequences_that_fill_the_context_end(tiny_folder, depth):
    own, quick = both(str(tiny_folder), depth)

    drive(own, quick, [(f"5-{i}", range(10 + i), {"max_tokens": 1000}) for i in range(5)])

    assert all(10 + i + len(quick.told[f"5-{i}"][0]) == CONTEXT for i in range(5))


@pytest.mark.parametrize("depth", [1, 2])
def test_aborted_sequences_and_late_ones(tiny_folder, depth):
    from vllm.v1.request import RequestStatus

    own, quick = both(str(tiny_folder), depth)
    late = list(requests_of(7, 3))

    def abort(scheduler):
        scheduler.finish_requests(["6-0", "6-3"], RequestStatus.FINISHED_ABORTED)

    def add(scheduler):
        for name, prompt, options in late:
            scheduler.add_request(new_request(name, prompt, **options))

    drive(own, quick, list(requests_of(6, 6, most=110)), events={9: abort, 14: add})

    assert quick.scheduler.rlbench_num_quick > 0


@pytest.mark.parametrize("depth", [1, 2])
def test_one_that_wants_text_or_prompt_logprobs_keeps_vllms_way(tiny_folder, depth):
    own, quick = both(str(tiny_folder), depth)
    requests = list(requests_of(8, 4))
    requests[1][2]["detokenize"] = True
    requests[1][2]["max_tokens"] = 120

    drive(own, quick, requests)

    after = len(quick.batches) - 120
    assert quick.scheduler.rlbench_num_quick <= max(0, after)


def test_several_logprobs_of_a_token_are_kept_in_their_columns():
    from vllm.v1.engine import EngineCoreOutput

    from rlbench.engine.vllm_scheduler import _give

    class Request:
        _output_token_ids = [4, 5, 6]

    state = HeldTokens(Request(), frozenset(), 2, [5, 105, 6, 106], [-0.5, -1.5, -0.6, -1.6])
    output = EngineCoreOutput(request_id="a", new_token_ids=[])

    _give(output, state)

    assert output.new_token_ids == [5, 6]
    assert output.new_logprobs.logprob_token_ids.tolist() == [[5, 105], [6, 106]]
    assert np.allclose(output.new_logprobs.logprobs, [[-0.5, -1.5], [-0.6, -1.6]])
    assert state.num_held == 0


def test_layers_with_a_window_keep_vllms_scheduler(tiny_folder):
    scheduler = new_scheduler(str(tiny_folder), is_async=True, sliding_window=32)
    kind = type(scheduler)

    assert not schedule_quickly(scheduler) and type(scheduler) is kind


def test_the_short_way_is_given_once(tiny_folder):
    scheduler = new_scheduler(str(tiny_folder), is_async=True)

    assert schedule_quickly(scheduler) and not schedule_quickly(scheduler)


@pytest.mark.usefixtures("one_thread")
def test_a_real_engine_takes_the_short_way_and_draws_the_same_tokens(tiny, monkeypatch):
    from tests.engine.factories import start_vllm

    engine = start_vllm(tiny)
    scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler

    def drawn(*stop):
        prompts, sampling = [[2 + i, 5, 9] for i in range(6)], SamplingParams(max_tokens=24, stop_token_ids=stop)
        found = engine.generate(prompts, sampling, range(6))
        return [(c.token_ids, c.sampling_logprobs, c.finish_reason) for c in found]

    stop = drawn()[0][0][10]
    before = scheduler.rlbench_num_quick
    found, num_quick = drawn(stop), scheduler.rlbench_num_quick
    monkeypatch.setattr(scheduler, "_rlbench_schedule", lambda: None)
    expected = drawn(stop)
    num_later = scheduler.rlbench_num_quick
    engine.close()

    assert before > 18 and num_quick > before + 6 and num_later == num_quick
    assert found == expected and {reason for _, _, reason in found} == {"stop", "length"}
