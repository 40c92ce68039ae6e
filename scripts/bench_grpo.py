"""Whole GRPO steps on one GPU, as users run them: generation, rewards, update, the adapter back into the engine.

    python scripts/bench_grpo.py [--cases llama-3.1-8b:nf4] [--impls rlbench,unsloth,trl] [--output FILE.json]

16 prompts of 200 tokens with 16 completions each, whose lengths are the same for every implementation: drawn once,
800 tokens in the mean and 2,048 at most, in another order each step. Random weights, LoRA of rank 16 on all linear
layers, a reward of random numbers, so that every group teaches. Each implementation in a process of its own:

    rlbench    python -m rlbench, its defaults for the device
    unsloth    fast_inference=True and its GRPO trainer, its defaults
    trl        GRPOTrainer with vLLM in its process, PEFT, Liger's loss and gradient checkpointing; bf16 in any case,
               since it cannot hand a quantised base to vLLM

Lengths are forced where requests enter vLLM (`LLMEngine.add_request`), alike for all. The first step is warm-up. Times
are of whole steps, medians of the others; "device" memory is the highest that the driver reported in use. The gap is
what each trainer reports of its own rollouts, |engine - trainer| of a token's logprob; all learn at a rate of 1e-6.
Floors: of the update 4 x weights x tokens FLOPs at the measured matmul rate; of generation the weights' bytes read once
a token of the longest completion at the measured copy rate, or 2 x weights x tokens FLOPs, whichever is longer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getsource
from pathlib import Path
from typing import Any

import yaml
from bench_step import ALPHA, LINEARS, RANK
from bench_workers import matmul_tflops, rows_of_process, spare_flashinfer, write_result
from random_models import num_weights, random_model, text_of

from rlbench.models.allocator import use_expandable_segments

NUM_PROMPTS, GROUP_SIZE, PROMPT_TOKENS = 16, 16, 200
GAP = "logprob gap of sampled tokens, engine to trainer, mean"
MEAN_LENGTH, MAX_LENGTH = 800, 2048
ROOT = Path(__file__).resolve().parents[1]


def drawn_lengths(count: int, mean: int = MEAN_LENGTH, longest: int = MAX_LENGTH) -> list[int]:
    """Log-normal, cut at `longest`, scaled to the mean: a long tail, as reasoning models write."""
    draw = random.Random(0)
    raw = [draw.lognormvariate(0.0, 0.6) for _ in range(count)]
    scale = mean / statistics.fmean(raw)
    for _ in range(50):  # the cut lowers the mean
        lengths = [min(longest, max(1, round(scale * value))) for value in raw]
        scale *= mean / statistics.fmean(lengths)
    return lengths


class ForcedLengths:
    """Every request with `longest` as its most tokens gets the next of the lengths, and no other end."""

    def __init__(self, lengths: list[int], longest: int) -> None:
        self._lengths, self._longest, self._num_given = lengths, longest, 0

    def __call__(self, params: Any) -> Any:
        """vLLM's parameters of one request.

        Raises:
            RuntimeError: the request asks for several completions.
        """
        if getattr(params, "max_tokens", None) != self._longest:
            return params  # a check's, not a rollout's
        if params.n != 1:
            raise RuntimeError(f"a request for {params.n} completions, expected one each")
        step, index = divmod(self._num_given, len(self._lengths))
        order = random.Random(step).sample(range(len(self._lengths)), len(self._lengths))
        self._num_given += 1
        forced = params.clone()
        forced.max_tokens, forced.ignore_eos = self._lengths[order[index]], True
        forced.stop, forced.stop_token_ids = [], []
        return forced

    def install(self) -> None:
        from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore[reportMissingImports]

        original = LLMEngine.add_request

        def add_request(engine: Any, request_id: str, prompt: Any, params: Any, *rest: Any, **named: Any) -> Any:
            return original(engine, request_id, prompt, self(params), *rest, **named)

        LLMEngine.add_request = add_request  # pyright: ignore[reportAttributeAccessIssue]


class DeviceWatch:
    """Highest memory in use on the device, by all that uses it."""

    def __init__(self) -> None:
        self.peak = 0
        self._is_over = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            thread.join()

    def _look(self) -> None:
        import torch

        while not self._is_over.wait(0.05):
            free, total = torch.cuda.mem_get_info()
            self.peak = max(self.peak, total - free)


def write_rows(folder: Path, shape: str, count: int) -> Path:
    draw = random.Random(0)
    file = folder / "rows.jsonl"
    rows = [{"prompt": text_of(shape, [draw.randrange(1000) for _ in range(PROMPT_TOKENS)])} for _ in range(count)]
    file.write_text("".join(json.dumps({**row, "answer": "1"}) + "\n" for row in rows))
    return file


def random_reward(completions: list[Any], **columns: Any) -> list[float]:
    """As TRL calls rewards: of each completion a number in [0, 1)."""
    del columns
    return [random.random() for _ in completions]


def run_rlbench(
    model: str, rows: Path, folder: Path, quantization: str, steps: int, more: list[str]
) -> tuple[list[dict[str, Any]], int]:
    """The metrics of its steps, and training.tokens_per_microbatch."""
    from rlbench.__main__ import main as rlbench

    (folder / "noise_reward.py").write_text(f"import random\nfrom typing import Any\n\n{getsource(random_reward)}")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = f"{folder}:{os.environ.get('PYTHONPATH', '')}"  # of the reward workers
    run = folder / "run"
    sys.argv = [
        "rlbench", "+exp=grpo_gsm8k", f"model.path={model}", f"model.quantization={quantization}", f"data.path={rows}",
        "data.prompt_column=prompt", "data.answer_column=answer", "data.system_prompt=null", "data.examples=[]",
        "~rewards.components.accuracy", "~rewards.components.format", "rewards.allowed_prefixes=[noise_reward]",
        "+rewards.components.noise={path:noise_reward.random_reward}", f"algorithm.prompts_per_step={NUM_PROMPTS}",
        f"algorithm.group_size={GROUP_SIZE}", f"sampling.max_tokens={MAX_LENGTH}", f"training.num_steps={steps}",
        f"lora.rank={RANK}", f"lora.alpha={ALPHA}", "evaluation.num_prompts=0", "tracking.wandb=disabled",
        "engine=vllm", "checks.identity_limit_scale=100", "checks.drift_stop_ess_frac=0", "checks.drift_stop_nats=100",
        "optim.lr=1e-6", f"hydra.run.dir={run}", *more,
    ]  # fmt: skip
    try:
        rlbench()
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"the run ended with status {ended.code}") from ended
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = yaml.safe_load((run / "config.yaml").read_text())
    return [line for line in lines if line.get("phase") == "train"], config["training"]["tokens_per_microbatch"]


def rlbench_worker(case: str, steps: int, lengths: ForcedLengths, report: Any, more: list[str]) -> None:
    shape, quantization = case.split(":")
    lengths.install()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(folder, shape, NUM_PROMPTS * steps)
        found, tokens = run_rlbench(random_model(shape, quantization), rows, folder, quantization, steps, more)
    report("training.tokens_per_microbatch", tokens, "tokens")
    report("step 1", found[0]["time/step_s"], "s")
    report(f"step 1, {GAP}", found[0]["drift/logprob_gap_mean"], "nats")
    found = found[1:]
    phases = ("generation", "rewards", "identity", "update", "weight_sync", "recording")
    report("step", statistics.median(line["time/step_s"] for line in found), "s")
    for phase in phases:
        report(phase, statistics.median(line.get(f"time/{phase}_s", 0.0) for line in found), "s")
    report(GAP, statistics.median(line["drift/logprob_gap_mean"] for line in found), "nats")
    report("completion tokens of a step", found[-1]["completion/num_tokens"], "tokens")
    report("engine and trainer, allocated", 1024 * max(line["memory/peak_gib"] for line in found), "MiB")


def peer_worker(case: str, steps: int, lengths: ForcedLengths, report: Any, make: Any, device: DeviceWatch) -> None:
    """One of the peers' trainers: whole steps by a callback, generation where vLLM is called."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    shape, quantization = case.split(":")
    lengths.install()
    generated: list[float] = []
    generate = LLM.generate

    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        outputs = generate(*arguments, **named)
        generated.append(time.perf_counter() - start)
        return outputs

    LLM.generate = timed
    ends: list[float] = []
    gaps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **named: Any) -> None:
            if not ends:
                ends.append(time.perf_counter())

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            torch.cuda.synchronize()
            ends.append(time.perf_counter())
            report(f"step {len(ends) - 1}, of them generation", generated[-1], "s")  # a time limit may end it
            report(f"step {len(ends) - 1}", ends[-1] - ends[-2], "s")
            report(f"step {len(ends) - 1}, device until its end", device.peak / 2**20, "MiB")

        def on_log(self, *arguments: Any, logs: Any = None, **named: Any) -> None:
            if logs and "sampling/sampling_logp_difference/mean" in logs:
                gaps.append(logs["sampling/sampling_logp_difference/mean"])
                report(f"step {len(gaps)}, {GAP}", gaps[-1], "nats")

    with tempfile.TemporaryDirectory() as name:
        rows = write_rows(Path(name), shape, NUM_PROMPTS * steps).read_text().splitlines()
        data = Dataset.from_list([{"prompt": json.loads(row)["prompt"]} for row in rows])
        trainer = make(shape, quantization, data, steps, name)
        trainer.add_callback(Clock())
        trainer.train()
    report("step", statistics.median(b - a for a, b in zip(ends[1:], ends[2:], strict=False)), "s")
    report("generation", statistics.median(generated[1:]), "s")
    report("engine and trainer, allocated", torch.cuda.max_memory_allocated() / 2**20, "MiB")


def grpo_config(steps: int, folder: str, **options: Any) -> Any:
    from trl import GRPOConfig  # pyright: ignore

    return GRPOConfig(
        output_dir=folder, num_generations=GROUP_SIZE, max_completion_length=MAX_LENGTH, max_steps=steps, bf16=True,
        temperature=1.0, beta=0.0, learning_rate=1e-6, report_to="none", save_strategy="no", logging_steps=1, **options,
    )  # fmt: skip


def make_unsloth(shape: str, quantization: str, data: Any, steps: int, folder: str) -> Any:
    from trl import GRPOTrainer  # pyright: ignore
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    model, tokenizer = FastLanguageModel.from_pretrained(
        random_model(shape, quantization), max_seq_length=PROMPT_TOKENS + MAX_LENGTH + 8, fast_inference=True,
        load_in_4bit=quantization == "nf4", max_lora_rank=RANK,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, use_gradient_checkpointing="unsloth", random_state=0
    )
    arguments = grpo_config(
        steps, folder, per_device_train_batch_size=GROUP_SIZE, gradient_accumulation_steps=NUM_PROMPTS
    )
    rewards: Any = [random_reward]
    return GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=rewards, args=arguments, train_dataset=data
    )


def make_trl(shape: str, quantization: str, data: Any, steps: int, folder: str) -> Any:
    import torch
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOTrainer  # pyright: ignore

    del quantization
    model = random_model(shape, "none")
    size = GROUP_SIZE // 2
    arguments = grpo_config(
        steps, folder, per_device_train_batch_size=size, gradient_accumulation_steps=NUM_PROMPTS * GROUP_SIZE // size,
        use_vllm=True, vllm_mode="colocate", vllm_max_model_length=PROMPT_TOKENS + MAX_LENGTH + 8,
        gradient_checkpointing=True, use_liger_kernel=True, model_init_kwargs={"dtype": torch.bfloat16},
    )  # fmt: skip
    rewards: Any = [random_reward]
    return GRPOTrainer(
        model=model, processing_class=AutoTokenizer.from_pretrained(model), reward_funcs=rewards,
        args=arguments, train_dataset=data, peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS),
    )  # fmt: skip


def run_worker(case: str, impl: str, steps: int, more: list[str]) -> None:
    spare_flashinfer()
    if impl == "rlbench":
        use_expandable_segments()  # as `python -m rlbench` does, here before the model is made
    if impl == "unsloth":
        import unsloth  # noqa: F401  # pyright: ignore[reportMissingImports]  (must come before torch's other users)

    def report(metric: str, value: float, unit: str) -> None:
        row = {"case": case.replace(":", ", "), "impl": impl, "metric": metric, "value": value, "unit": unit}
        print("ROW " + json.dumps(row), flush=True)

    lengths = ForcedLengths(drawn_lengths(NUM_PROMPTS * GROUP_SIZE), MAX_LENGTH)
    device = DeviceWatch()
    with device.watching():
        if impl == "rlbench":
            rlbench_worker(case, steps, lengths, report, more)
        else:
            peer_worker(case, steps, lengths, report, make_unsloth if impl == "unsloth" else make_trl, device)
    report("device", device.peak / 2**20, "MiB")


def floors(case: str) -> list[dict[str, Any]]:
    """Of generation and update, in seconds; in a process of its own."""
    import torch

    shape, quantization = case.split(":")
    weights, lengths = num_weights(shape), drawn_lengths(NUM_PROMPTS * GROUP_SIZE)
    rate = matmul_tflops() * 1e12
    source = torch.empty(2**31, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
    bandwidth = 2 * 2**31 / (time.perf_counter() - start)
    read_s = max(lengths) * weights * {"nf4": 0.52, "fp8": 1}.get(quantization, 2) / bandwidth
    tokens = sum(lengths) + NUM_PROMPTS * PROMPT_TOKENS
    values = {"generation": max(read_s, 2 * weights * tokens / rate), "update": 4 * weights * tokens / rate}
    name = case.replace(":", ", ")
    return [{"case": name, "impl": "floor", "metric": k, "value": v, "unit": "s"} for k, v in values.items()]


def run_case(case: str, impl: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Its rows; a last one with the error if it did not finish."""
    command = [sys.executable, __file__, "--worker", case, impl, "--steps", str(options.steps), *options.more]
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    rows, failure, lines = rows_of_process(command, options.timeout_s, PYTHONPATH=path)
    print(
        f"{case} {impl}: " + ", ".join(f"{row['metric']} {row['value']:.4g} {row['unit']}" for row in rows), flush=True
    )
    if failure:
        print(f"did not finish ({failure}):\n" + "\n".join(lines[-25:]), flush=True)
        last = next((line for line in reversed(lines) if "Error" in line), "")[-300:]
        rows.append({"case": case.replace(":", ", "), "impl": impl, "error": f"{failure}; {last}"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "IMPL"))
    parser.add_argument("--floors", metavar="CASE")
    parser.add_argument("--cases", default="llama-3.1-8b:nf4")
    parser.add_argument("--impls", default="rlbench,unsloth,trl")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--timeout-s", type=float, default=500)
    parser.add_argument("--commit", default="")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "grpo_h100.json")
    options, options.more = parser.parse_known_args()
    if options.worker:
        case, impl = options.worker
        run_worker(case, impl, options.steps, options.more)
        return
    if options.floors:
        print(json.dumps(floors(options.floors)))
        return
    rows: list[dict[str, Any]] = []
    for case in options.cases.split(","):
        shape, quantization = case.split(":")
        for kind in {quantization, *(["none"] if "trl" in options.impls else [])}:  # made where it frees the device
            made = [sys.executable, str(Path(__file__).parent / "bench_step.py"), "--make", f"{shape}:{kind}"]
            subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        found = subprocess.run(
            [sys.executable, __file__, "--floors", case], check=True, stdout=subprocess.PIPE, text=True
        )
        rows += json.loads(found.stdout.splitlines()[-1])
        for impl in options.impls.split(","):
            rows += run_case(case, impl, options)
            command = f"python scripts/bench_grpo.py --cases {options.cases} --impls {options.impls}"
            write_result(options.output, rows, f"{command} --steps {options.steps}", options.commit)


if __name__ == "__main__":
    main()
