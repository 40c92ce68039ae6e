"""Where the seconds of vLLM's start go: what it is doing is looked up every 20 ms.

    python scripts/bench_start.py [--cases llama-3.1-8b:nf4:none] [--variants plain,decode_graphs] [--output FILE.json]

A case is model:quantization:dense copies. Every variant starts in a process of its own, twice: the first finds no
caches of torch.compile and Triton, the second those of the first. Variants change vLLM's compilation_config:

    plain              as rlbench starts it
    decode_graphs      CUDA graphs of batches that only decode (cudagraph_mode FULL_DECODE_ONLY)
    adapter_graphs     no CUDA graphs of batches without the adapter, which only checks have
    no_graphs          none at all
    own_sizes          as many sizes of graphs as vLLM would choose itself

A row's metric is a stage of vLLM's start (imports, weights, warm-up, graphs, ...) and, after a comma, what was done in
it: tracing and compiling, Triton, the rest. Milliseconds a token of 256 and of 8 sequences are beside them, since a
variant may cost there what it spares here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

from bench_workers import rows_of_process, spare_flashinfer, write_result

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decode_graphs": {"cudagraph_mode": "FULL_DECODE_ONLY"},
    "adapter_graphs": {},
    "no_graphs": {"cudagraph_mode": "NONE"},
    "own_sizes": {"cudagraph_capture_sizes": None},
}
PERIOD_S = 0.02
_STAGES = {  # by the name of a function that is running
    "load_model": "weights",
    "determine_available_memory": "profile run",
    "kernel_warmup": "kernels' warm-up",
    "capture_model": "graphs",
    "compile_or_warm_up_model": "warm-up",
    "initialize_from_config": "KV cache",
    "init_device": "device",
    "_greedy_tokens": "canary",
    "_register_zero_adapter": "zero adapter",
}
_ACTIVITIES = {  # by a part of a running function's file
    "torch/_inductor": "torch.compile",
    "torch/_dynamo": "torch.compile",
    "torch/_functorch": "torch.compile",
    "triton/compiler": "Triton",
    "triton/backends": "Triton",
}


class Lookout:
    """Counts what the main thread does while it is open.

    Attributes:
        seconds: by "stage, activity".
        unnamed: by the innermost function, of samples that no stage has.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.unnamed: dict[str, float] = defaultdict(float)
        self._is_over = threading.Event()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Lookout:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        last = time.perf_counter()
        while not self._is_over.wait(PERIOD_S):
            now = time.perf_counter()
            frames = functions(sys._current_frames().get(self._watched))
            stage, activity = classify(frames)
            self.seconds[f"{stage}, {activity}" if activity else stage] += now - last
            if stage == "the rest":
                self.unnamed[" < ".join(f"{Path(file).name}:{name}" for file, name in frames[:3])] += now - last
            last = now


def functions(frame: FrameType | None) -> list[tuple[str, str]]:
    """(file, name) of what runs, the innermost first."""
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    return found


def classify(frames: list[tuple[str, str]]) -> tuple[str, str]:
    """Stage and activity ("" for none) of a stack, the innermost function first."""
    if any(name == "_find_and_load" for _, name in frames):
        return "imports", ""
    stage = next((_STAGES[name] for _, name in frames if name in _STAGES), "the rest")
    activity = next((what for file, _ in frames for part, what in _ACTIVITIES.items() if part in file), "")
    return stage, activity


def largest(seconds: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(seconds.items(), key=lambda pair: -pair[1])


def work(case: str, variant: str, nth: int) -> None:
    import torch
    from bench_dense_copies import random_adapter
    from bench_shared_base import random_prompts
    from random_models import random_model

    from rlbench.records import SamplingParams

    spare_flashinfer()
    shape, quantization, copies = case.split(":")
    folder = random_model(shape, quantization)
    if nth < 0:  # only made, where it frees the device
        return
    torch.cuda.init()

    def report(metric: str, value: float, unit: str) -> None:
        words = f"{shape}, {quantization}, copies {copies}, start {nth + 1}"
        print("ROW " + json.dumps({"case": words, "impl": variant, "metric": metric, "value": value, "unit": unit}))

    begin = time.perf_counter()
    with Lookout() as lookout:
        engine = start_engine(folder, quantization, copies, variant)
    report("start", time.perf_counter() - begin, "s")
    for what, taken in largest(lookout.seconds):
        report(f"start, {what}", taken, "s")
    for what, taken in largest(lookout.unnamed)[:8]:
        print(f"    {taken:.1f} s {what}", file=sys.stderr)
    engine.sync(random_adapter(engine, 1e-3), 1)
    free, total = torch.cuda.mem_get_info()
    report("device, less KV", (total - free) / 2**20 - 4096, "MiB")
    for count in (256, 8):
        prompts = [prompt[:64] for prompt in random_prompts(count)[:count]]
        for tokens in (16, 128):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            engine.generate(prompts, SamplingParams(max_tokens=tokens), list(range(count)))
            torch.cuda.synchronize()
            taken = time.perf_counter() - begin
        report(f"{count} sequences", 1e3 * taken / 128, "ms a token")


def start_engine(folder: str, quantization: str, copies: str, variant: str) -> Any:
    """A VllmEngine whose vLLM got the compilation_config of that variant."""
    from unittest.mock import patch

    import vllm  # pyright: ignore[reportMissingImports]

    from rlbench.engine.vllm_engine import VllmEngine

    real: Any = vllm.LLM

    def changed(**named: Any) -> Any:
        options = {**named.get("compilation_config", {}), **VARIANTS[variant]}
        named["compilation_config"] = {key: value for key, value in options.items() if value is not None}
        return real(**named)

    if variant == "adapter_graphs":
        leave_out_graphs_of_the_base()
    with patch.object(vllm, "LLM", changed):
        return VllmEngine(
            folder, device="cuda", dtype="bfloat16", quantization=quantization, dense_copies=copies,
            max_model_len=2112, max_num_seqs=256, lora_rank=16, kv_cache_gib=4.0,
        )  # fmt: skip


def leave_out_graphs_of_the_base() -> None:
    """Before our worker captures; vLLM runs batches that no graph fits without one."""
    from rlbench.engine.vllm_gpu_worker import SharedBaseWorker

    capture: Any = SharedBaseWorker.compile_or_warm_up_model

    def compile_or_warm_up_model(worker: Any) -> Any:
        manager = worker.model_runner.cudagraph_manager
        for mode, batches in manager._capture_descs.items():
            manager._capture_descs[mode] = [batch for batch in batches if batch.num_active_loras]
        manager._candidates = {key: found for key, found in manager._candidates.items() if key[1]}
        return capture(worker)

    worker_class: Any = SharedBaseWorker
    worker_class.compile_or_warm_up_model = compile_or_warm_up_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=3, metavar=("CASE", "VARIANT", "NTH"))
    parser.add_argument("--cases", default="llama-3.1-8b:nf4:none,llama-3.1-8b:nf4:merged")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--timeout-s", type=float, default=200)
    parser.add_argument("--commit", default="")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "start_h200.json")
    options = parser.parse_args()
    if options.worker:
        case, variant, nth = options.worker
        work(case, variant, int(nth))
        return
    rows: list[dict[str, Any]] = []
    command = f"python scripts/bench_start.py --cases {options.cases} --variants {options.variants}"
    for case in options.cases.split(","):
        subprocess.run([sys.executable, __file__, "--worker", case, "plain", "-1"], check=True)
        for variant in options.variants.split(","):
            rows += rows_of_variant(case, variant, options)
            write_result(options.output, rows, f"{command} --starts {options.starts}", options.commit)


def rows_of_variant(case: str, variant: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Of its starts, which share caches that are empty at first; a row with the error of one that did not finish."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as caches:
        places = {
            "VLLM_CACHE_ROOT": f"{caches}/vllm", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "TRITON_CACHE_DIR": f"{caches}/triton",
        }  # fmt: skip
        for nth in range(options.starts):
            command = [sys.executable, __file__, "--worker", case, variant, str(nth)]
            rows, failure, lines = rows_of_process(command, options.timeout_s, **places)
            print(f"{case}, {variant}, start {nth + 1}:", flush=True)
            for row in rows:
                print(f"  {row['metric']}: {row['value']:.1f} {row['unit']}", flush=True)
            print(*[line for line in lines if line.startswith("    ")][-8:], sep="\n", flush=True)
            if failure:
                print(*lines[-20:], sep="\n", flush=True)
                rows.append(
                    {"case": case, "impl": variant, "error": f"start {nth + 1}: {failure}; {lines[-1:]}"[-300:]}
                )
            found += rows
    return found


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main()
