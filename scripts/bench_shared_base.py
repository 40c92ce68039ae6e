"""One base for vLLM and the trainer on one GPU: memory, adapter sync, sleep and wake, generation, agreement.

    python scripts/bench_shared_base.py [--cases rlbench:smollm2-135m:nf4,vllm:llama-3.1-8b:nf4] [--output FILE.json]

SmolLM2-135M has its real weights (--smollm2 names a folder, GGUF file or hub id); the other shapes have random ones,
made on the spot. Every case runs in a process of its own. Implementations: rlbench; vllm, which generates with a LoRA
of the same size that it loaded from a folder; unsloth (fast_inference) and trl (colocate), of which the memory is
measured once trainer and engine are up, less their keys and values. One that cannot run is listed with its error. A
case is implementation:model:quantization, of rlbench with :fp8 at its end for FP8 keys and values.
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

from bench_workers import rows_of_process, spare_flashinfer, write_result
from random_models import SHAPES

CASES = (
    "rlbench:smollm2-135m:none", "rlbench:smollm2-135m:nf4", "rlbench:smollm2-135m:none:fp8",
    "rlbench:smollm2-135m:fp8:fp8", "rlbench:qwen2.5-1.5b:nf4", "rlbench:llama-3.1-8b:nf4",
    "rlbench:llama-3.1-8b:nf4:fp8", "vllm:llama-3.1-8b:nf4", "unsloth:llama-3.1-8b:nf4",
    "rlbench:llama-3.1-8b:none", "trl:llama-3.1-8b:none",
)  # fmt: skip
MIB = 2**20
RANK = 16
KV_GIB = 16.0


def model_folder(name: str, quantization: str, smollm2: str) -> str:
    if name not in SHAPES:
        return smollm2_folder(smollm2)
    # In a process of its own: what it allocates must not count below.
    code = f"from random_models import random_model; print(random_model({name!r}, {quantization!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
    return done.stdout.split()[-1]


def smollm2_folder(smollm2: str) -> str:
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


def split_case(case: str) -> tuple[str, str, str, dict[str, str]]:
    """Implementation, model, quantization, and the options of `measure`."""
    impl, name, quantization, *kv_cache_dtype = case.split(":")
    return impl, name, quantization, {"kv_cache_dtype": kv_cache_dtype[0]} if kv_cache_dtype else {}


def case_words(name: str, quantization: str, options: dict[str, str]) -> str:
    return f"{name}, {quantization}" + (f", {options['kv_cache_dtype']} keys and values" if options else "")


def reporter(impl: str, words: str) -> Any:
    def report(metric: str, value: float, unit: str) -> None:
        row = {"case": words, "impl": impl, "metric": metric, "value": value, "unit": unit}
        print("ROW " + json.dumps(row), flush=True)

    return report


def measure(folder: str, name: str, quantization: str, report: Any, kv_cache_dtype: str = "auto") -> None:
    import torch

    from rlbench.config.schema import LoraConfig
    from rlbench.engine.vllm_engine import VllmEngine
    from rlbench.models.policy import Policy
    from rlbench.models.shared_base import bind_base

    nothing = used_mib()
    engine = VllmEngine(
        folder, device="cuda", dtype="bfloat16", quantization=quantization, max_model_len=1024, max_num_seqs=256,
        lora_rank=RANK, kv_cache_gib=KV_GIB, kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    report("engine start", engine.start_s, "s")
    alone = used_mib()
    report("vLLM alone, less KV", alone - nothing - KV_GIB * 1024, "MiB")
    base = bind_base(folder, engine.base_weights(), dtype=torch.bfloat16)
    report("bound base", used_mib() - alone, "MiB")
    policy = Policy(base, LoraConfig(rank=RANK), seed=0)
    report("adapter", sum(p.numel() * p.element_size() for p in policy.parameters()) / MIB, "MiB")
    report("trainer and adapter, above vLLM alone", used_mib() - alone, "MiB")
    report("engine and trainer, less KV", used_mib() - nothing - KV_GIB * 1024, "MiB")
    if name not in SHAPES:
        report_gap(folder, engine, policy, report, "without adapter")
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
    sleeps, wakes, freed, reserved = [], [], [], []
    for _ in range(20):
        before = used_mib()
        sleeps.append(timed(engine.sleep))
        freed.append(before - used_mib())
        wakes.append(timed(engine.wake))
        reserved.append(torch.cuda.memory_reserved() / MIB)
    report("sleep", 1e3 * statistics.median(sleeps), "ms")
    report("wake with canary", 1e3 * statistics.median(wakes), "ms")
    report("given back by sleep", statistics.median(freed), "MiB")
    report("growth of reserved memory over 20 cycles", reserved[-1] - reserved[0], "MiB")
    report_rate(lambda n: generate(engine, random_prompts(n), n), report)
    if name not in SHAPES:
        report_gap(folder, engine, policy, report, "with adapter")
    engine.close()


def measure_vllm(folder: str, name: str, quantization: str, report: Any) -> None:
    """vLLM as its users start it, with a LoRA of all linear layers from a folder."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    nothing = used_mib()
    with tempfile.TemporaryDirectory() as adapter:
        write_adapter(folder, adapter)
        start = time.perf_counter()
        start_llm: Any = LLM
        llm = start_llm(
            folder, dtype="bfloat16", quantization={"nf4": "bitsandbytes", "fp8": "fp8_per_channel"}.get(quantization),
            max_model_len=1024, max_num_seqs=256, kv_cache_memory_bytes=int(KV_GIB * 2**30), skip_tokenizer_init=True,
            enable_lora=True, max_loras=1, max_lora_rank=RANK, logprobs_mode="processed_logprobs",
        )  # fmt: skip
        report("engine start", time.perf_counter() - start, "s")
        report("engine alone, less KV", used_mib() - nothing - KV_GIB * 1024, "MiB")
        request = LoRARequest("policy", 1, adapter)

        def run(number: int) -> None:
            llm.reset_prefix_cache()
            sampling = [
                SamplingParams(max_tokens=256, logprobs=0, seed=1000 * number + i, ignore_eos=True, detokenize=False)
                for i in range(256)
            ]
            prompts = [{"prompt_token_ids": prompt} for prompt in random_prompts(number)]
            llm.generate(prompts, sampling, lora_request=request, use_tqdm=False)

        report_rate(run, report)


def write_adapter(folder: str, adapter: str) -> None:
    """Random LoRA in PEFT's format for all linear layers but the head."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tensors, targets = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, module.in_features) / module.in_features**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(module.out_features, RANK) * 0.01
            targets.add(name.rsplit(".", 1)[-1])
    save_file(tensors, f"{adapter}/adapter_model.safetensors")
    LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=sorted(targets)).save_pretrained(adapter)


def measure_unsloth(folder: str, name: str, quantization: str, report: Any) -> None:
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    nothing = used_mib()
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=1024, load_in_4bit=quantization == "nf4", fast_inference=True, max_lora_rank=RANK,
        gpu_memory_utilization=0.5,
    )  # fmt: skip
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=2 * RANK, target_modules=linears)
    report("engine and trainer, less KV", used_mib() - nothing - kv_mib(model.vllm_engine), "MiB")


def measure_trl(folder: str, name: str, quantization: str, report: Any) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore

    nothing = used_mib()
    options = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.5, bf16=True,
        per_device_train_batch_size=8, num_generations=8, max_completion_length=256, report_to="none",
        model_init_kwargs={"dtype": "bfloat16"}, vllm_max_model_length=1024,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=folder,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=options,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 8),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
    )
    report("engine and trainer, less KV", used_mib() - nothing - kv_mib(trainer.vllm_generation.llm), "MiB")


def kv_mib(llm: Any) -> float:
    """Keys and values of an in-process vLLM."""
    return llm.collective_rpc(lambda worker: sum(cache.nbytes for cache in worker.model_runner.kv_caches))[0] / MIB


def random_prompts(number: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(number)
    return [torch.randint(10, 40_000, (128,), generator=generator).tolist() for _ in range(256)]


def report_rate(run: Any, report: Any) -> None:
    rates = [256 * 256 / timed(lambda: run(number)) for number in range(3)]  # noqa: B023
    report("generation with adapter, 256 x 256 tokens, a seed a sample", statistics.median(rates), "tokens/s")


def generate(engine: Any, prompts: list[list[int]], number: int) -> None:
    from rlbench.records import SamplingParams

    engine.generate(prompts, SamplingParams(max_tokens=256), [1000 * number + i for i in range(256)])


def report_gap(folder: str, engine: Any, policy: Any, report: Any, adapter: str) -> None:
    """|engine - trainer| in nats on 128 x 64 tokens sampled at temperature 1 after short questions."""
    import torch
    from transformers import AutoTokenizer

    from rlbench.checks.trainer_logprobs import pack_sequences, trainer_logprobs
    from rlbench.records import SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        f"A box holds {3 + i} pens and costs ${i % 9 + 1}. Ann buys {i % 7 + 2} boxes. Explain." for i in range(128)
    ]
    chats = [[{"role": "user", "content": text}] for text in texts]
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in rendered]
    completions = engine.generate(prompts, SamplingParams(max_tokens=64), list(range(128)))
    batch = pack_sequences(prompts, [c.token_ids for c in completions], policy.device)
    sampled = torch.tensor([logprob for c in completions for logprob in c.sampling_logprobs])
    gap = (trainer_logprobs(policy, batch)[0].cpu() - sampled).abs()
    for metric, value in (("mean", gap.mean()), ("p99", gap.quantile(0.99)), ("max", gap.max())):
        report(f"logprob gap of sampled tokens, {adapter}, {metric}", float(value), "nats")


IMPLS = {"rlbench": measure, "vllm": measure_vllm, "unsloth": measure_unsloth, "trl": measure_trl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", metavar="CASE")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--smollm2", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--timeout-s", type=float, default=400)
    parser.add_argument("--commit", default="")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "shared_base_h200.json")
    arguments = parser.parse_args()
    if arguments.worker:
        spare_flashinfer()
        impl, name, quantization, options = split_case(arguments.worker)
        report = reporter(impl, case_words(name, quantization, options))
        IMPLS[impl](model_folder(name, quantization, arguments.smollm2), name, quantization, report, **options)
        return
    rows: list[dict[str, Any]] = []
    for case in arguments.cases.split(","):
        rows += run_case(case, arguments)
        command = f"python scripts/bench_shared_base.py --cases {arguments.cases}"
        write_result(arguments.output, rows, command, arguments.commit)


def run_case(case: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Its rows; a last one with the error if it did not finish."""
    command = [sys.executable, __file__, "--worker", case, "--smollm2", arguments.smollm2]
    rows, failure, lines = rows_of_process(command, arguments.timeout_s, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    for row in rows:
        print(f"{row['impl']}: {row['case']}: {row['metric']}: {row['value']:.4g} {row['unit']}", flush=True)
    if failure:
        print(f"{case} did not finish ({failure}):\n" + "\n".join(lines[-25:]), flush=True)
        impl, name, quantization, options = split_case(case)
        last = next((line for line in reversed(lines) if "Error" in line), "")[-300:]
        rows.append({"case": case_words(name, quantization, options), "impl": impl, "error": f"{failure}; {last}"})
    return rows


if __name__ == "__main__":
    main()
