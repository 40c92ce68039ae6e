"""What the host does between two steps of vLLM: its scheduler, its way of a token to its output, and our short way.

    python scripts/bench_scheduler.py [--sequences 8,64,256] [--output FILE.json]

Sequences of 64 prompt tokens get one more token in each step, all of them running, as in most steps of a rollout. The
model is left out: its tokens and logprobs are drawn by NumPy. Both ways take turns in rounds; seconds are those of
`schedule`, `update_from_output` and the output processor. Works with the vLLM of a GPU and of a CPU, on any machine;
the tokens that come out of both are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_workers import write_result

BLOCK, PROMPT, CONTEXT = 16, 64, 2112
STEPS, ROUNDS, WARM_UP = 150, 5, 40
WAYS = ("vllm", "rlbench")
PHASES: tuple[str, ...] = ("schedule", "update", "outputs")


class Host:
    """A scheduler, its output processor, and two steps on their way, as vLLM's engine has them."""

    def __init__(self, folder: str, count: int, way: str) -> None:
        from vllm.v1.engine.output_processor import OutputProcessor  # pyright: ignore[reportMissingImports]

        from rlbench.engine.vllm_requests import _keep_numbers_only
        from rlbench.engine.vllm_scheduler import schedule_quickly

        self.scheduler = new_scheduler(folder, count)
        if way == "rlbench":
            assert schedule_quickly(self.scheduler)
        self.outputs = OutputProcessor(None, log_stats=False)
        hasher = block_hasher()
        for index in range(count):
            request, core = new_request(index, hasher)
            self.outputs.add_request(core, None)
            _keep_numbers_only(self.outputs.request_states[core.request_id].logprobs_processor)
            self.scheduler.add_request(request)
        self.draw = np.random.default_rng(0)
        self.on_their_way: list[Any] = []

    def run(self, steps: int) -> dict[str, float]:
        """Seconds by phase."""
        taken: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        for _ in range(steps):
            start = time.perf_counter()
            scheduled = self.scheduler.schedule()
            taken["schedule"] += time.perf_counter() - start
            self.on_their_way.append((scheduled, self.model_output(scheduled)))
            if len(self.on_their_way) < 2:
                continue
            scheduled, output = self.on_their_way.pop(0)
            start = time.perf_counter()
            found = self.scheduler.update_from_output(scheduled, output)
            middle = time.perf_counter()
            self.outputs.process_outputs(found[0].outputs if found else [])
            taken["update"] += middle - start
            taken["outputs"] += time.perf_counter() - middle
        return taken

    def model_output(self, scheduled: Any) -> Any:
        from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput  # pyright: ignore[reportMissingImports]

        names = list(scheduled.num_scheduled_tokens)
        tokens = self.draw.integers(0, 1000, len(names))
        logprobs = LogprobsLists(
            tokens[:, None].astype(np.int32), -self.draw.random((len(names), 1)).astype(np.float32),
            np.zeros(len(names), np.int32), None,
        )  # fmt: skip
        return ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[[int(token)] for token in tokens], logprobs=logprobs, prompt_logprobs_dict={},
            pooler_output=[],
        )  # fmt: skip

    def tokens(self) -> list[list[int]]:
        return [list(request._output_token_ids) for request in self.scheduler.running]


def new_scheduler(folder: str, count: int) -> Any:
    from vllm.config import (  # pyright: ignore[reportMissingImports]
        CacheConfig,
        DeviceConfig,
        ModelConfig,
        SchedulerConfig,
        VllmConfig,
    )
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # pyright: ignore[reportMissingImports]
    from vllm.v1.kv_cache_interface import (  # pyright: ignore[reportMissingImports]
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
    )
    from vllm.v1.structured_output import StructuredOutputManager  # pyright: ignore[reportMissingImports]

    model: Any = ModelConfig
    whole = VllmConfig(
        model_config=model(model=folder, dtype="float32", seed=0, skip_tokenizer_init=True, max_model_len=CONTEXT),
        scheduler_config=SchedulerConfig(
            max_num_seqs=count, max_num_batched_tokens=PROMPT * count, max_model_len=CONTEXT, is_encoder_decoder=False
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        device_config=DeviceConfig("cpu"),
    )
    num_blocks = count * (CONTEXT // BLOCK + 1)
    whole.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    scheduler = AsyncScheduler(
        vllm_config=whole,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(whole), block_size=BLOCK, log_stats=False,
    )  # fmt: skip
    scheduler.use_v2_model_runner = True
    return scheduler


def block_hasher() -> Any:
    from vllm.utils.hashing import get_hash_fn_by_name  # pyright: ignore[reportMissingImports]
    from vllm.v1.core.kv_cache_utils import (  # pyright: ignore[reportMissingImports]
        get_request_block_hasher,
        init_none_hash,
    )

    function = get_hash_fn_by_name("sha256")
    init_none_hash(function)
    return get_request_block_hasher(BLOCK, function)


def new_request(index: int, hasher: Any) -> tuple[Any, Any]:
    """As vLLM's scheduler and as its output processor take it."""
    from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine import EngineCoreRequest  # pyright: ignore[reportMissingImports]
    from vllm.v1.request import Request  # pyright: ignore[reportMissingImports]

    from rlbench.engine.vllm_requests import params

    sampling = params(max_tokens=CONTEXT, logprobs=0, seed=index)
    sampling.output_kind = RequestOutputKind.FINAL_ONLY
    core = EngineCoreRequest(
        request_id=str(index), prompt_token_ids=np.random.default_rng(index).integers(0, 1000, PROMPT).tolist(),
        mm_features=None, sampling_params=sampling, pooling_params=None, arrival_time=0.0, lora_request=None,
        cache_salt="a", data_parallel_rank=None,
    )  # fmt: skip
    core.external_req_id = core.request_id
    return Request.from_engine_core_request(core, hasher), core


def measure(folder: str, count: int) -> list[dict[str, Any]]:
    hosts = {way: Host(folder, count, way) for way in WAYS}
    for host in hosts.values():
        host.run(WARM_UP)
    rounds = [{way: host.run(STEPS) for way, host in hosts.items()} for _ in range(ROUNDS)]
    assert hosts["vllm"].tokens() == hosts["rlbench"].tokens()
    rows = []
    for way in WAYS:
        found = {phase: 1e3 * statistics.median(one[way][phase] for one in rounds) / STEPS for phase in PHASES}
        found["all"] = 1e3 * statistics.median(sum(one[way].values()) for one in rounds) / STEPS
        rows += [
            {"case": f"{count} sequences", "impl": way, "metric": metric, "value": value, "unit": "ms a step"}
            for metric, value in found.items()
        ]
        print(f"{count} sequences, {way}: " + ", ".join(f"{k} {v:.3f} ms" for k, v in found.items()), flush=True)
    return rows


def tiny_config(folder: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "qwen2", hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=1000, max_position_embeddings=2 * CONTEXT,
    )  # fmt: skip
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", default="8,64,256")
    parser.add_argument("--commit", default="")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scheduler_cpu.json")
    options = parser.parse_args()
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    with tempfile.TemporaryDirectory() as folder:
        tiny_config(folder)
        rows = [row for count in options.sequences.split(",") for row in measure(folder, int(count))]
    write_result(
        options.output, rows, f"python scripts/bench_scheduler.py --sequences {options.sequences}", options.commit
    )


if __name__ == "__main__":
    main()
