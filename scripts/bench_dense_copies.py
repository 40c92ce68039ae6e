"""What engine.dense_copies is worth, and what it costs: vLLM with none, base and merged copies on one GPU.

    python scripts/bench_dense_copies.py [--cases llama-3.1-8b:nf4,smollm2-135m:nf4] [--output FILE.json]

Every kind of copies runs in a process of its own, one after the other. A shape has random weights; rates are of
decoding with logprobs, at 256, 64 and 8 sequences after prompts of 64 tokens, and of 256 completions whose lengths are
those of `bench_grpo.py`: 800 tokens in the mean, 2,048 at most. SmolLM2-135M has its real weights (--smollm2): there
the logprobs of sampled tokens are compared with the trainer's, with adapters whose B is as large as after about 1, 10
and 100 steps at a learning rate of 2e-4, and beside them how far those adapters move the trainer from its base.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench_grpo import MAX_LENGTH, ForcedLengths, drawn_lengths
from bench_shared_base import random_prompts, report_gap, reporter, smollm2_folder
from bench_workers import rows_of_process, write_result
from random_models import SHAPES, random_model

KINDS = {"nf4": ("none", "base", "merged"), "none": ("none", "merged")}
RANK, SEQUENCES, TOKENS = 16, (256, 64, 8), 128
SIZES = (2e-4, 2e-3, 2e-2)  # of the elements of B


def start(folder: str, quantization: str, kind: str, context: int) -> Any:
    from rlbench.engine.vllm_engine import VllmEngine

    return VllmEngine(
        folder, device="cuda", dtype="bfloat16", quantization=quantization, dense_copies=kind, max_model_len=context,
        max_num_seqs=256, lora_rank=RANK, kv_cache_gib=20.0,
    )  # fmt: skip


def random_adapter(engine: Any, size: float, seed: int = 0) -> Any:
    """A as PEFT draws it, B with elements of that size."""
    import torch

    from rlbench.engine.interface import Adapter

    generator = torch.Generator(device="cuda").manual_seed(seed)
    lora_a, lora_b = {}, {}
    for name, (num_in, num_out, _) in engine._slot_shapes.items():
        lora_a[name] = torch.empty(RANK, num_in, device="cuda").uniform_(-1, 1, generator=generator) * num_in**-0.5
        lora_b[name] = size * torch.randn(num_out, RANK, device="cuda", generator=generator)
    return Adapter(lora_a=lora_a, lora_b=lora_b, scaling=2.0)


def timed_ms(call: Any, repeats: int = 5) -> float:
    import torch

    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def measure_speed(folder: str, quantization: str, kind: str, report: Any) -> None:
    from rlbench.records import SamplingParams

    engine = start(folder, quantization, kind, 64 + MAX_LENGTH)
    report("engine start", engine.start_s, "s")
    engine.sync(random_adapter(engine, 1e-3), 1)
    if kind == "merged":
        contents = iter([True, False] * 10)
        report("copies filled, base and adapter in turn", timed_ms(
            lambda: engine._call("rlbench_use_merged", next(contents)), repeats=10), "ms")  # fmt: skip
        engine._call("rlbench_use_merged", True)
        report("copies proven", timed_ms(lambda: engine._call("rlbench_num_differing")), "ms")
    for count in SEQUENCES:
        prompts = [prompt[:64] for prompt in random_prompts(count)[:count]]

        def decode(tokens: int = TOKENS) -> None:
            engine.generate(prompts, SamplingParams(max_tokens=tokens), list(range(len(prompts))))  # noqa: B023

        decode(16)
        report(f"{count} sequences", timed_ms(decode, repeats=2) / TOKENS, "ms a token")
    lengths = drawn_lengths(256)
    ForcedLengths(lengths, MAX_LENGTH).install()
    prompts = [prompt[:64] for prompt in random_prompts(1)]
    begin = time.perf_counter()
    found = engine.generate(prompts, SamplingParams(max_tokens=MAX_LENGTH), list(range(256)))
    taken = time.perf_counter() - begin
    assert sorted(len(completion.token_ids) for completion in found) == sorted(lengths)
    report("256 completions of drawn lengths", taken, "s")
    report("256 completions of drawn lengths, rate", sum(lengths) / taken, "tokens/s")


def measure_gap(folder: str, quantization: str, kind: str, report: Any) -> None:
    import torch

    from rlbench.config.schema import LoraConfig
    from rlbench.models.policy import Policy
    from rlbench.models.shared_base import bind_base

    engine = start(folder, quantization, kind, 1024)
    policy = Policy(bind_base(folder, engine.base_weights(), dtype=torch.bfloat16), LoraConfig(rank=RANK), seed=0)
    report_gap(folder, engine, policy, report, "without adapter")
    for version, size in enumerate(SIZES, start=1):
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for key, parameter in policy.named_parameters():
                if "lora_B" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
        engine.sync(policy.adapter(), version)
        report_gap(folder, engine, policy, report, f"B of {size:g}")
        report(f"trainer moved from its base, B of {size:g}, mean", adapter_effect(policy), "nats")


def adapter_effect(policy: Any) -> float:
    """Mean |logprob with the adapter - without| of random tokens."""
    from rlbench.checks.trainer_logprobs import pack_sequences, trainer_logprobs

    prompts = random_prompts(9)[:32]
    batch = pack_sequences([prompt[:64] for prompt in prompts], [prompt[64:] for prompt in prompts], policy.device)
    trained, base = (trainer_logprobs(policy, batch, use_adapter=on)[0] for on in (True, False))
    return float((trained - base).abs().mean())


def work(case: str, smollm2: str) -> None:
    name, quantization, kind = case.split(":")
    report = reporter(f"rlbench, dense_copies={kind}", f"{name}, {quantization}")
    if name in SHAPES:
        measure_speed(random_model(name, quantization), quantization, kind, report)
    else:
        measure_gap(smollm2_folder(smollm2), quantization, kind, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", metavar="CASE")
    parser.add_argument("--cases", default="llama-3.1-8b:nf4,smollm2-135m:nf4,smollm2-135m:none")
    parser.add_argument("--smollm2", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--timeout-s", type=float, default=300)
    parser.add_argument("--commit", default="")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "dense_copies_h100.json")
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.smollm2)
        return
    rows: list[dict[str, Any]] = []
    for case in arguments.cases.split(","):
        for kind in KINDS[case.partition(":")[2]]:
            command = [sys.executable, __file__, "--worker", f"{case}:{kind}", "--smollm2", arguments.smollm2]
            found, failure, lines = rows_of_process(command, arguments.timeout_s, VLLM_ENABLE_V1_MULTIPROCESSING="0")
            for row in found:
                print(f"{row['case']}, {row['impl']}: {row['metric']} {row['value']:.4g} {row['unit']}", flush=True)
            rows += found
            if failure:
                rows.append({"case": case, "impl": kind, "error": f"{failure}: {lines[-1] if lines else ''}"})
                print("\n".join(lines[-15:]), flush=True)
            write_result(arguments.output, rows, f"python scripts/bench_dense_copies.py --cases {arguments.cases}",
                         arguments.commit)  # fmt: skip


if __name__ == "__main__":
    main()
