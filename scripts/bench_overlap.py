"""What training beside the end of generation would save: both at once against one after the other, on one GPU.

    python scripts/bench_overlap.py [--cases llama-3.1-8b:nf4:merged] [--output FILE.json]

Where few completions of a batch are still growing, groups that are finished could be trained on: gradients are added
up, and the policy stays as it is until all are there. A case is model:quantization:dense copies. In one process vLLM
samples N sequences, and microbatches of GRPO go forward and backward in a second thread, on a CUDA stream of its own,
until the sampling is over and theirs is done. A row's case ends with N and with Python's switch interval, the longest
that a thread keeps the other from running. `saved` is 1 - together / (sampling alone + as many microbatches alone):
0.5 if each hid the other whole, below 0 if it is quicker to do one after the other. Each microbatch is a step of its
own here (its AdamW included), the engine's adapter is a copy, and the models have random weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_dense_copies import random_adapter, start
from bench_shared_base import random_prompts, reporter
from bench_step import RANK, check, make_batch, make_samples
from bench_workers import rows_of_process, write_result
from random_models import SHAPES, random_model

SEQUENCES, TOKENS = (64, 24, 8), 256
INTERVALS_S = (5e-3, 2e-4)  # Python's own, and a short one
PROMPT, CONTEXT = 64, 2048
BUDGET = 8192  # tokens of a microbatch
Work = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Together:
    """Sampling and training at once."""

    sampling_s: float
    all_s: float  # until the last microbatch was done, too
    num_microbatches: int

    def saved(self, sampling_alone_s: float, microbatch_alone_s: float) -> float:
        """Share of the time that one after the other takes."""
        return 1 - self.all_s / (sampling_alone_s + self.num_microbatches * microbatch_alone_s)


def together(sample: Work, train: Work, switch_interval_s: float) -> Together:
    """Call `train` in another thread over and over until `sample` returns; `train` returns when its work is done.

    Raises:
        RuntimeError: `train` raised.
    """
    is_over, errors, counts = threading.Event(), [], [0]

    def repeat() -> None:
        try:
            while not is_over.is_set():
                train()
                counts[0] += 1
        except Exception as error:
            errors.append(error)

    before = sys.getswitchinterval()
    thread = threading.Thread(target=repeat)
    sys.setswitchinterval(switch_interval_s)
    try:
        begin = time.perf_counter()
        thread.start()
        sample()
        sampling_s = time.perf_counter() - begin
    finally:
        is_over.set()
        thread.join()
        sys.setswitchinterval(before)
    if errors:
        raise RuntimeError("training beside sampling failed") from errors[0]
    return Together(sampling_s, time.perf_counter() - begin, counts[0])


def seconds(work: Work, repeats: int = 3) -> float:
    """Median, after a first call that does not count."""
    work()
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def training(folder: str, engine: Any) -> Work:
    """A microbatch of `BUDGET` tokens, forward and backward, on the engine's base; a stream of its own."""
    import torch

    from rlbench.config.schema import AlgorithmConfig, LoraConfig, OptimConfig
    from rlbench.models.policy import Policy
    from rlbench.models.shared_base import bind_base
    from rlbench.training.optim import make_optimizer
    from rlbench.training.step import train_step
    from rlbench.training.update import make_minibatches

    base = bind_base(folder, engine.base_weights(), dtype=torch.bfloat16)
    policy = Policy(base, LoraConfig(rank=RANK, alpha=2 * RANK), seed=0)
    optimizer = make_optimizer(policy.parameters(), OptimConfig(lr=1e-6))
    algorithm = AlgorithmConfig(importance="off")
    (minibatch,) = make_minibatches(
        make_samples("grpo", make_batch("grpo", 1000)), algorithm, tokens_per_microbatch=BUDGET,
        max_completion_tokens=1000, device="cuda",
    )  # fmt: skip
    fullest = max(minibatch.microbatches, key=lambda microbatch: len(microbatch.token_ids))
    stream = torch.cuda.Stream()

    def train() -> None:
        with torch.cuda.stream(stream):
            check(train_step(policy, [fullest], optimizer, algorithm, temperature=1.0, max_grad_norm=0))
        stream.synchronize()

    return train


def work(case: str) -> None:
    import torch

    from rlbench.records import SamplingParams

    shape, quantization, copies = case.split(":")
    folder = random_model(shape, quantization)
    engine = start(folder, quantization, copies, CONTEXT)
    engine.sync(random_adapter(engine, 1e-3), 1)
    if copies == "merged":
        engine._call("rlbench_use_merged", True)
    train = training(folder, engine)
    name = f"{shape}, {quantization}, copies {copies}"
    microbatch_s = seconds(train)
    reporter("one after the other", name)(f"a microbatch of {BUDGET} tokens", microbatch_s, "s")
    for count in SEQUENCES:
        prompts = [prompt[:PROMPT] for prompt in random_prompts(count)[:count]]

        def sample() -> None:
            engine.generate(prompts, SamplingParams(max_tokens=TOKENS), list(range(len(prompts))))  # noqa: B023
            torch.cuda.default_stream().synchronize()

        alone_s = seconds(sample)
        reporter("one after the other", f"{name}, {count} sequences")("sampling", 1e3 * alone_s / TOKENS, "ms a token")
        for interval_s in INTERVALS_S:
            together(sample, train, interval_s)  # fills the allocator's pool of that stream
            found = together(sample, train, interval_s)
            report = reporter("together", f"{name}, {count} sequences, switch interval {1e3 * interval_s:g} ms")
            report("sampling", 1e3 * found.sampling_s / TOKENS, "ms a token")
            report("microbatches", found.num_microbatches, "microbatches")
            report("both", found.all_s, "s")
            report("saved", found.saved(alone_s, microbatch_s), "share")
    free, total = torch.cuda.mem_get_info()
    reporter("together", name)("device", (total - free) / 2**20, "MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", metavar="CASE")
    parser.add_argument("--cases", default="llama-3.1-8b:nf4:merged,qwen2.5-1.5b:nf4:merged")
    parser.add_argument("--timeout-s", type=float, default=300)
    parser.add_argument("--commit", default="")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "overlap_h200.json")
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    wrong = [case for case in options.cases.split(",") if case.split(":")[0] not in SHAPES]
    if wrong:
        parser.error(f"--cases has {wrong[0]}, expected one of {', '.join(SHAPES)} as its model")
    rows: list[dict[str, Any]] = []
    for case in options.cases.split(","):
        command = [sys.executable, __file__, "--worker", case]
        found, failure, lines = rows_of_process(command, options.timeout_s, VLLM_ENABLE_V1_MULTIPROCESSING="0")
        for row in found:
            print(f"{row['case']}, {row['impl']}: {row['metric']} {row['value']:.4g} {row['unit']}", flush=True)
        rows += found
        if failure:
            rows.append({"case": case, "impl": "together", "error": f"{failure}: {lines[-1] if lines else ''}"})
            print("\n".join(lines[-15:]), flush=True)
        write_result(options.output, rows, f"python scripts/bench_overlap.py --cases {options.cases}", options.commit)


if __name__ == "__main__":
    main()
