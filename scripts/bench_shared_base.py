"""One base for vLLM and the trainer on one GPU: memory, adapter sync, sleep and wake, generation, agreement.

    python scripts/bench_shared_base.py [--cases smollm2-135m:nf4,qwen2.5-1.5b:nf4] [--output FILE.json]

SmolLM2-135M has its real weights (--smollm2 names a folder, GGUF file or hub id); the other shapes have random ones,
made on the spot. Every case runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = ("smollm2-135m:none", "smollm2-135m:nf4", "qwen2.5-1.5b:nf4", "qwen2.5-1.5b:none", "llama-3.1-8b:nf4")
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
MIB = 2**20
RANK = 16


def random_model(shape: str) -> str:
    """Folder with a model of that shape, random bfloat16 weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(tempfile.gettempdir()) / "rlbench-random-models" / shape
    if not (folder / "config.json").is_file():
        options = dict(SHAPES[shape])
        config = AutoConfig.for_model(options.pop("model_type"), **options, max_position_embeddings=8192)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    return str(folder)


def model_folder(name: str, smollm2: str) -> str:
    if name in SHAPES:
        # In a process of its own: what it allocates must not count below.
        code = f"import bench_shared_base as b; b.random_model({name!r})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
        return random_model(name)
    from rlbench.config.schema import ModelConfig
    from rlbench.models.source import resolve_model

    return str(resolve_model(ModelConfig(path=smollm2)).folder)


def used_mib() -> float:
    """Device memory in use by this process and all others."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / MIB


def timed(call: Any) -> float:
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, quantization: str, smollm2: str) -> None:
    import torch

    from rlbench.config.schema import LoraConfig
    from rlbench.engine.vllm_engine import VllmEngine
    from rlbench.models.policy import Policy
    from rlbench.models.shared_base import bind_base
    from rlbench.records import SamplingParams

    def report(metric: str, value: float, unit: str) -> None:
        row = {"case": f"{name}, {quantization}", "impl": "rlbench", "metric": metric, "value": value, "unit": unit}
        print("ROW " + json.dumps(row), flush=True)

    folder = model_folder(name, smollm2)
    kv_gib = 16.0
    engine = VllmEngine(
        folder, device="cuda", dtype="bfloat16", quantization=quantization, max_model_len=1024, max_num_seqs=256,
        lora_rank=RANK, kv_cache_gib=kv_gib,
    )  # fmt: skip
    report("engine start", engine.start_s, "s")
    alone = used_mib()
    report("vLLM alone, KV cache included", alone, "MiB")
    base = bind_base(folder, engine.base_weights(), dtype=torch.bfloat16)
    report("bound base", used_mib() - alone, "MiB")
    policy = Policy(base, LoraConfig(rank=RANK), seed=0)
    adapter_mib = sum(p.numel() * p.element_size() for p in policy.parameters()) / MIB
    report("trainer and adapter, above vLLM alone", used_mib() - alone, "MiB")
    report("adapter", adapter_mib, "MiB")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in policy.named_parameters():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    adapter = policy.adapter()
    engine.sync(adapter, 1)
    worker_call = lambda: engine._call("rlbench_write_adapter", 1, adapter.lora_a, adapter.lora_b, adapter.scaling)  # noqa: E731
    report("adapter copy into the engine", 1e3 * statistics.median(timed(worker_call) for _ in range(10)), "ms")
    report("whole sync with fingerprint", 1e3 * timed(lambda: engine.sync(adapter, 2)), "ms")
    sleeps, wakes, freed = [], [], []
    for _ in range(5):
        before = used_mib()
        sleeps.append(timed(engine.sleep))
        freed.append(before - used_mib())
        wakes.append(timed(engine.wake))
    report("sleep", 1e3 * statistics.median(sleeps), "ms")
    report("wake with canary", 1e3 * statistics.median(wakes), "ms")
    report("given back by sleep", statistics.median(freed), "MiB")
    prompts = [torch.randint(10, 40_000, (128,), generator=generator).tolist() for _ in range(256)]
    for seeded in (True, False):
        rates = []
        for round_number in range(3):
            seeds = [1000 * round_number + i for i in range(256)]
            seconds = timed(lambda: generate(engine, prompts, seeds, seeded))  # noqa: B023
            rates.append(256 * 256 / seconds)
        label = "a seed a sample" if seeded else "no seeds"
        report(f"generation with adapter, 256 x 256 tokens, {label}", statistics.median(rates), "tokens/s")
    if name not in SHAPES:
        report_gap(engine, policy, report, SamplingParams(max_tokens=64))
    engine.close()


def generate(engine: Any, prompts: list[list[int]], seeds: list[int], seeded: bool) -> None:
    from rlbench.engine.vllm_requests import params
    from rlbench.records import SamplingParams

    if seeded:
        engine.generate(prompts, SamplingParams(max_tokens=256), seeds)
        return
    engine._drop_prefixes()
    engine._run(prompts, [params(max_tokens=256, temperature=1.0, logprobs=0) for _ in prompts], use_adapter=True)


def report_gap(engine: Any, policy: Any, report: Any, sampling: Any) -> None:
    """|engine - trainer| in nats on sampled tokens, after short English-like prompts, with the adapter off and on."""
    import torch

    from rlbench.data.packing import pack
    from rlbench.records import TrainingSample
    from rlbench_kernels import linear_logprobs

    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(200, 8_000, (24,), generator=generator).tolist() for _ in range(128)]
    completions = engine.generate(prompts, sampling, list(range(128)))
    gaps = []
    for prompt, completion in zip(prompts, completions, strict=True):
        length = len(completion.token_ids)
        sample = TrainingSample(
            group_id="0", prompt_token_ids=tuple(prompt), token_ids=completion.token_ids,
            sampling_logprobs=completion.sampling_logprobs, advantages=(1.0,) * length, loss_mask=(True,) * length,
        )  # fmt: skip
        (microbatch,) = pack([sample], tokens_per_microbatch=10_000, device="cuda")
        with torch.no_grad():
            found = linear_logprobs(policy.hidden(microbatch), policy.head_weight, microbatch.targets)[0]
        gaps.append((found.cpu() - torch.tensor(completion.sampling_logprobs)).abs())
    gap = torch.cat(gaps)
    for metric, value in (("mean", gap.mean()), ("p99", gap.quantile(0.99)), ("max", gap.max())):
        report(f"logprob gap of sampled tokens, with adapter, {metric}", float(value), "nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", metavar="CASE")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--smollm2", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--timeout-s", type=float, default=240)
    parser.add_argument("--commit", default="")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "shared_base_h100.json")
    arguments = parser.parse_args()
    if arguments.worker:
        name, quantization = arguments.worker.split(":")
        measure(name, quantization, arguments.smollm2)
        return
    rows: list[dict[str, Any]] = []
    for case in arguments.cases.split(","):
        rows += run_case(case, arguments)
        write(arguments, rows)


def run_case(case: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--worker", case, "--smollm2", arguments.smollm2]
    with tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=arguments.timeout_s, check=False
            )
            output, failed = done.stdout, done.returncode != 0
        except subprocess.TimeoutExpired as expired:
            output, failed = (expired.stdout or b"").decode(), True
        errors.seek(0)
        if failed:
            print(f"{case} did not finish:\n{errors.read()[-3000:]}", flush=True)
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW ")]
    for row in rows:
        print(f"{row['case']}: {row['metric']}: {row['value']:.4g} {row['unit']}", flush=True)
    return rows


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from importlib.metadata import version

    import torch

    result = {
        "command": f"python scripts/bench_shared_base.py --cases {arguments.cases}",
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "vllm", "transformers", "bitsandbytes")},
        "commit": arguments.commit,
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
