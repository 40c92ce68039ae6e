"""A hundred updates of random lengths on one GPU: does memory grow, do kernels compile again, does the pace hold?

    python scripts/soak_step.py [--case llama-3.1-8b:nf4] [--option auto@8192] [--steps 100] --output FILE.json

Every step is another GRPO batch: 4 prompts of 200 tokens, 4 completions each of 50 to 1,000; the last 20 are the first
20 again and differ by the device's pace alone. Reported: tokens/s of 20 steps in a row, the best and the last,
and the last 20 against the first; memory that torch's allocator keeps, after 20 steps and at the end; Triton's
compilations after the first 20; the share of the time during which the driver saw a kernel run. The first 5 steps warm
up and count nowhere.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bench_step import PROMPT_TOKENS, check, load_rlbench
from bench_workers import rows_of_process, write_result
from random_models import random_model

from rlbench.models.allocator import use_expandable_segments

WARM_UP, WINDOW = 5, 20
NUM_PROMPTS, GROUP_SIZE, SHORTEST, LONGEST = 4, 4, 50, 1000


def random_samples(seed: int) -> list[Any]:
    from rlbench.records import TrainingSample

    draw = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 1000) for _ in range(count))

    samples = []
    for group in range(NUM_PROMPTS):
        prompt = ids(PROMPT_TOKENS)
        for _ in range(GROUP_SIZE):
            count = draw.randint(SHORTEST, LONGEST)
            samples.append(
                TrainingSample(
                    group_id=str(group),
                    prompt_token_ids=prompt,
                    token_ids=ids(count),
                    sampling_logprobs=(-10.0,) * count,
                    advantages=(draw.gauss(0.0, 1.0),) * count,
                    loss_mask=(True,) * count,
                )
            )
    return samples


class Utilization:
    """Share of the time in which a kernel ran, as the driver reports it."""

    def __init__(self) -> None:
        self._seen: list[int] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        import torch

        while not self._is_over.wait(0.2):
            self._seen.append(torch.cuda.utilization())

    def end(self) -> float:
        self._is_over.set()
        self._thread.join()
        return statistics.fmean(self._seen) / 100


def count_compilations() -> list[str]:
    """Names of kernels, one more each time that Triton compiles one or reads it from its cache on disk."""
    from triton import knobs

    names: list[str] = []

    def note(**named: Any) -> None:
        names.append(named["fn"].name)

    knobs.runtime.jit_post_compile_hook = note
    return names


def run_worker(case: str, option: str, num_steps: int) -> None:
    import torch

    from rlbench.config.schema import AlgorithmConfig
    from rlbench.training.step import train_step
    from rlbench.training.update import make_minibatches

    shape, quantization = case.split(":")
    folder = random_model(shape, quantization)
    _, policy, optimizer, training = load_rlbench(folder, quantization, option, PROMPT_TOKENS + LONGEST)
    algorithm = AlgorithmConfig(importance="off")
    names, times, tokens, reserved, compiled = count_compilations(), [], [], [], []
    watch = None
    for number in range(WARM_UP + num_steps):
        is_repeat = number >= WARM_UP + num_steps - WINDOW
        samples = random_samples(number - is_repeat * (num_steps - WINDOW))
        if number == WARM_UP:
            watch = Utilization()
        start = time.perf_counter()
        (minibatch,) = make_minibatches(
            samples, algorithm, tokens_per_microbatch=training.tokens_per_microbatch, max_completion_tokens=LONGEST,
            device="cuda",
        )  # fmt: skip
        check(train_step(
            policy, minibatch.microbatches, optimizer, algorithm, temperature=1.0, max_grad_norm=1.0,
            totals=minibatch.totals,
        ))  # fmt: skip
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        tokens.append(sum(len(sample.token_ids) for sample in samples))
        reserved.append(torch.cuda.memory_reserved() / 2**20)
        compiled.append(len(names))
    busy = watch.end() if watch else 0.0
    times, tokens, reserved, compiled = (column[WARM_UP:] for column in (times, tokens, reserved, compiled))
    pace = [
        sum(tokens[first : first + WINDOW]) / sum(times[first : first + WINDOW])
        for first in range(num_steps - WINDOW + 1)
    ]
    found = [
        (f"tokens/s of the best {WINDOW} steps in a row", max(pace), "tokens/s"),
        (f"tokens/s of the last {WINDOW} steps", pace[-1], "tokens/s"),
        ("last / best", pace[-1] / max(pace), "fraction"),
        ("last / first, the same batches", pace[-1] / pace[0], "fraction"),
        (f"memory kept after {WINDOW} steps", reserved[WINDOW - 1], "MiB"),
        ("memory kept at the end", reserved[-1], "MiB"),
        ("memory allocated at most", torch.cuda.max_memory_allocated() / 2**20, "MiB"),
        (f"compilations until step {WINDOW}, warm-up included", compiled[WINDOW - 1], "kernels"),
        ("compilations after it", compiled[-1] - compiled[WINDOW - 1], "kernels"),
        ("a kernel ran", busy, "share of the time"),
    ]
    for metric, value, unit in found:
        row = {"case": case.replace(":", ", "), "impl": f"rlbench:{option}", "metric": metric, "value": value}
        print("ROW " + json.dumps({**row, "unit": unit}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--case", default="llama-3.1-8b:nf4")
    parser.add_argument("--option", default="auto@8192")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--timeout-s", type=float, default=300)
    parser.add_argument("--commit", default="")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.steps < 2 * WINDOW:
        parser.error(f"--steps is {arguments.steps}, expected at least {2 * WINDOW}")
    shown = ["--case", arguments.case, "--option", arguments.option, "--steps", str(arguments.steps)]
    if arguments.worker:
        use_expandable_segments()  # as `python -m rlbench` does
        run_worker(arguments.case, arguments.option, arguments.steps)
        return
    rows, failure, lines = rows_of_process([sys.executable, __file__, "--worker", *shown], arguments.timeout_s)
    print(*(f"{row['metric']}: {row['value']:.4g} {row['unit']}" for row in rows), sep="\n")
    if failure:
        sys.exit(f"did not finish ({failure}):\n" + "\n".join(lines[-25:]))
    if arguments.output:
        write_result(arguments.output, rows, " ".join(["python scripts/soak_step.py", *shown]), arguments.commit)


if __name__ == "__main__":
    main()
