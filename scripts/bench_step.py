"""One training step on one GPU (forward, backward, AdamW) against the libraries that a user would take instead.

    python scripts/bench_step.py [--cases dense:llama-3.1-8b:nf4,..] [--impls rlbench,unsloth,trl] [--output FILE.json]

Batches: dense (8 sequences of 1,024 tokens, cross-entropy of all), long (one of 16,384), grpo (16 prompts of 200 tokens
with 8 completions of 50 to 1,000 each, every third group without signal, clipped surrogate), ppo (the same with a
critic's values and update; all have signal), dpo (16 such prompts with 2 completions each, the reference in the step),
one@L (a prompt of 200 tokens and one completion of L, clipped surrogate).
Random weights, LoRA of rank 16 on all linear layers. Implementations, each in a process of its own:

    rlbench    as configured by "recompute@tokens a forward[/RLBENCH_ATTENTION]": auto@8192, mlp+offload@8192/flash
    unsloth    its model, patches and checkpointing ("unsloth": offloaded; off: none); GRPO by its GRPOTrainer
    trl        transformers, PEFT and Liger kernels, gradient checkpointing on or off; GRPO and DPO by TRL's trainers
               (the installed one has no PPO)

Times are wall times of whole steps with the device synchronised, the median over the steps after the warm-up; memory is
the allocator's peak, weights included. The matmul rate is measured in every process before and after: a case whose two
rates differ by more than 3% is marked. Tokens: dense and long count all, grpo the completions' (those without signal
too). --memory takes two steps and reports no times: what else the device does has no part in it.
RLBENCH_PROFILE=FOLDER writes each case's kernels there, from one more step under torch's profiler. The floor
is 4 x weights x tokens FLOPs at that rate.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench_workers import matmul_tflops, rows_of_process, write_result
from random_models import num_weights, random_model

from rlbench.models.allocator import use_expandable_segments

RANK, ALPHA = 16, 32
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = "dense:llama-3.1-8b:nf4,grpo:llama-3.1-8b:nf4,dense:qwen3-4b:none,dense:qwen2.5-1.5b:none,long:qwen3-4b:nf4"
IMPLS = (
    "rlbench:auto@8192,rlbench:full@8192,rlbench:full@4096,rlbench:mlp+offload@8192,unsloth:unsloth,unsloth:off,"
    "trl:on,trl:off"
)
WARM_UP, MAX_WARM_UP_S, TIMED, MAX_TIMED_S = 3, 30.0, 8, 20.0
PROMPT_TOKENS, NUM_PROMPTS = 200, 16
GROUP_SIZES = {"grpo": 8, "ppo": 8, "dpo": 2}
Step = Callable[[], None]


def is_one(kind: str) -> bool:
    return kind.startswith("one@")


class Batch(NamedTuple):
    rows: list[list[int]]  # token ids; grpo: of the completions
    prompts: list[list[int]]  # of groups
    advantages: list[float]  # of grpo and ppo: by completion

    @property
    def group_size(self) -> int:
        return len(self.rows) // max(1, len(self.prompts))

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.rows))


def make_batch(kind: str, vocab: int) -> Batch:
    import torch

    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocab, (count,), generator=generator).tolist()

    if is_one(kind):
        return Batch([ids(int(kind.removeprefix("one@")))], [ids(PROMPT_TOKENS)], [1.0])
    if kind not in GROUP_SIZES:
        return Batch([ids(n) for n in ([1024] * 8 if kind == "dense" else [16_384])], [], [])
    count = NUM_PROMPTS * GROUP_SIZES[kind]
    lengths = torch.randint(50, 1001, (count,), generator=generator).tolist()
    advantages = torch.randn(NUM_PROMPTS, GROUP_SIZES[kind], generator=generator)
    if kind == "grpo":
        advantages[::3] = 0.0
    return Batch(
        [ids(n) for n in lengths], [ids(PROMPT_TOKENS) for _ in range(NUM_PROMPTS)], advantages.ravel().tolist()
    )


def load_rlbench(folder: str, quantization: str, option: str, longest: int) -> tuple[Any, Any, Any, Any]:
    """Base, policy, optimizer and the `training` config, as "recompute@tokens a forward[/RLBENCH_ATTENTION]" says."""
    import torch
    from transformers import AutoConfig

    from rlbench.config.schema import LoraConfig, OptimConfig, RunConfig
    from rlbench.models.base import load_base
    from rlbench.models.device import hardware_facts
    from rlbench.models.memory import derive_recompute
    from rlbench.models.policy import Policy
    from rlbench.training.optim import make_optimizer

    option, _, attention = option.partition("/")
    os.environ["RLBENCH_ATTENTION"] = attention or "auto"
    mode, tokens = option.split("@")
    mode, _, offload = mode.partition("+")
    config = RunConfig(stage="sft")
    config.hardware.profile, config.model.dtype, config.model.quantization = "gpu", "bfloat16", quantization
    config.training.recompute, config.training.tokens_per_microbatch = mode, max(int(tokens), longest)
    for found in derive_recompute(config, hardware_facts("gpu"), AutoConfig.from_pretrained(folder)):
        print(found, file=sys.stderr)
    base = load_base(folder, dtype=torch.bfloat16, device="cuda", quantization=quantization)
    policy = Policy(base, LoraConfig(rank=RANK, alpha=ALPHA), seed=0)
    config.training.offload = bool(offload)
    policy.set_recompute(config.training)
    optimizer = make_optimizer(policy.parameters(), OptimConfig(lr=1e-5))
    return base, policy, optimizer, config.training


def rlbench_step(folder: str, quantization: str, kind: str, option: str, batch: Batch) -> Step:
    import torch

    from rlbench.config.schema import AlgorithmConfig, LoraConfig, OptimConfig
    from rlbench.data.packing import pack
    from rlbench.models.value_head import Critic
    from rlbench.training.optim import make_optimizer
    from rlbench.training.sft_step import sft_step
    from rlbench.training.step import train_step
    from rlbench.training.update import make_minibatches
    from rlbench.training.value_step import update_critic

    longest = max(map(len, batch.rows))
    tokens = longest + PROMPT_TOKENS * is_one(kind)
    base, policy, optimizer, training = load_rlbench(folder, quantization, option, tokens)
    budget = training.tokens_per_microbatch
    samples = make_samples(kind, batch)
    algorithm = AlgorithmConfig(importance="off")
    if not batch.prompts:
        return lambda: check(sft_step(
            policy, pack(samples, tokens_per_microbatch=budget, device="cuda"), optimizer, max_grad_norm=0
        ))  # fmt: skip
    if kind == "dpo":
        return dpo_step(policy, optimizer, batch, budget)
    critic = Critic(base, LoraConfig(rank=RANK, alpha=ALPHA), seed=1) if kind == "ppo" else None
    if critic is not None:
        critic.set_recompute(training)
        critic_optimizer = make_optimizer(critic.parameters(), OptimConfig(lr=1e-5))

    def step() -> None:
        (minibatch,) = make_minibatches(
            samples, algorithm, tokens_per_microbatch=budget, max_completion_tokens=longest, device="cuda"
        )
        if critic is not None:
            with torch.no_grad():
                for microbatch in minibatch.microbatches:
                    critic.values(microbatch)
            found = update_critic(
                critic, [minibatch], critic_optimizer, num_updates=1, clip_value=0.2, max_grad_norm=1.0
            )
            if not found.is_finite:
                raise RuntimeError("the critic's step was not finite")
        check(train_step(
            policy, minibatch.microbatches, optimizer, algorithm, temperature=1.0, max_grad_norm=0,
            totals=minibatch.totals,
        ))  # fmt: skip

    return step


def dpo_step(policy: Any, optimizer: Any, batch: Batch, budget: int) -> Step:
    from rlbench.config.preference import PreferenceConfig
    from rlbench.data.preferences import PreferenceRow
    from rlbench.training.preference_step import make_batch as make_pairs
    from rlbench.training.preference_step import preference_step

    config = PreferenceConfig()
    config.beta = 0.1
    rows = [
        PreferenceRow(row_id=str(i), prompt_token_ids=tuple(prompt), completions=(tuple(chosen), tuple(rejected)))
        for i, (prompt, chosen, rejected) in enumerate(
            zip(batch.prompts, batch.rows[::2], batch.rows[1::2], strict=True)
        )
    ]

    def step() -> None:
        pairs = make_pairs(rows, config, tokens_per_microbatch=budget, device=policy.device)
        check(preference_step(policy, pairs, optimizer, config, max_grad_norm=0, reference=None))

    return step


def make_samples(kind: str, batch: Batch) -> list[Any]:
    """Dense rows are a prompt of one token and the rest."""
    from rlbench.records import TrainingSample

    samples = []
    for index, row in enumerate(batch.rows):
        is_group = bool(batch.prompts)
        prompt = batch.prompts[index // batch.group_size] if is_group else row[:1]
        completion = row if is_group else row[1:]
        advantage = batch.advantages[index] if is_group else 0.0
        values = (0.5,) * len(completion) if kind == "ppo" else ()
        samples.append(
            TrainingSample(
                group_id=str(index // batch.group_size if is_group else index),
                prompt_token_ids=tuple(prompt),
                token_ids=tuple(completion),
                sampling_logprobs=(-10.0,) * len(completion),
                advantages=(advantage,) * len(completion),
                loss_mask=(True,) * len(completion),
                values=values,
                returns=values,
            )
        )
    return samples


def check(result: Any) -> None:
    if not result.is_applied:
        raise RuntimeError("the step was not finite")


def unsloth_step(folder: str, quantization: str, kind: str, option: str, batch: Batch) -> Step:
    import unsloth  # noqa: F401  # pyright: ignore[reportMissingImports]  (patches what comes after it)
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    checkpointing: Any = "unsloth" if option == "unsloth" else False
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=max(2048, max(map(len, batch.rows)) + PROMPT_TOKENS), load_in_4bit=quantization == "nf4",
        use_gradient_checkpointing=checkpointing,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, target_modules=LINEARS, bias="none", random_state=0,
        use_gradient_checkpointing=checkpointing,
    )  # fmt: skip
    FastLanguageModel.for_training(model)
    return peer_step(model, tokenizer, kind, batch, {})


def trl_step(folder: str, quantization: str, kind: str, option: str, batch: Batch) -> Step:
    import liger_kernel.transformers as liger  # pyright: ignore[reportMissingImports]
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    family = AutoConfig.from_pretrained(folder).model_type
    getattr(liger, f"apply_liger_kernel_to_{family}")()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa"
    )
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS))
    is_on = option == "on"
    if is_on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    return peer_step(model, AutoTokenizer.from_pretrained(folder), kind, batch, {"gradient_checkpointing": is_on})


def peer_step(model: Any, tokenizer: Any, kind: str, batch: Batch, options: dict[str, Any]) -> Step:
    import torch

    if kind == "dpo":
        return dpo_peer_step(model, tokenizer, batch, options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    if kind == "ppo":
        raise RuntimeError("the installed TRL has no PPO trainer")
    if batch.prompts:
        parts, loss_of = grpo_parts(model, tokenizer, batch, options)
    else:
        ids = torch.tensor(batch.rows, device="cuda")
        parts = [{"input_ids": ids, "labels": ids}]
        loss_of = lambda part: model(**part).loss  # noqa: E731

    def step() -> None:
        for part in parts:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = loss_of(part)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not torch.isfinite(loss):
            raise RuntimeError("the loss is not finite")

    return step


def dpo_peer_step(model: Any, tokenizer: Any, batch: Batch, options: dict[str, Any]) -> Step:
    """A step of its trainer, whole: two pairs a forward, its data loader and its optimizer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer  # pyright: ignore

    def text(ids: list[int]) -> str:
        return " ".join(f"w{token}" for token in ids)

    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=2, gradient_accumulation_steps=NUM_PROMPTS // 2,
        max_steps=1, max_length=PROMPT_TOKENS + 1000, bf16=True, report_to="none", learning_rate=1e-5,
        save_strategy="no", **options,
    )  # fmt: skip
    rows = [
        {"prompt": text(prompt) + " ", "chosen": text(chosen), "rejected": text(rejected)}
        for prompt, chosen, rejected in zip(batch.prompts, batch.rows[::2], batch.rows[1::2], strict=True)
    ]
    trainer = DPOTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return lambda: (trainer.train(), None)[1]


def grpo_parts(model: Any, tokenizer: Any, batch: Batch, options: dict[str, Any]) -> tuple[list[Any], Any]:
    """One padded microbatch a group, as the trainer splits a batch of 16 x 8, and the trainer's loss of one.

    A single completion is one of two of a group, a microbatch each: the trainers take no smaller groups.
    """
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore

    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch.group_size,
        num_generations=max(2, batch.group_size), gradient_accumulation_steps=max(2, len(batch.prompts)),
        max_completion_length=max(1000, *map(len, batch.rows), 0), beta=0.0, bf16=True, report_to="none",
        **options,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "w5"}] * 128),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = len(batch.prompts)
    model = trainer.model
    model.train()  # pyright: ignore[reportOptionalMemberAccess]
    size = batch.group_size
    total = torch.tensor(batch.num_tokens, device="cuda")
    parts = []
    for group, prompt in enumerate(batch.prompts):
        rows = batch.rows[group * size : (group + 1) * size]
        longest = max(map(len, rows))
        parts.append({
            "prompt_ids": torch.tensor([prompt] * size, device="cuda"),
            "prompt_mask": torch.ones(size, len(prompt), dtype=torch.long, device="cuda"),
            "completion_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows], device="cuda"),
            "completion_mask": torch.tensor(
                [[1] * len(row) + [0] * (longest - len(row)) for row in rows], device="cuda"
            ),
            "advantages": torch.tensor(batch.advantages[group * size : (group + 1) * size], device="cuda"),
            "num_items_in_batch": total,
        })  # fmt: skip
    return parts, lambda part: trainer.compute_loss(model, dict(part))


STEPS = {"rlbench": rlbench_step, "unsloth": unsloth_step, "trl": trl_step}


def run_worker(case: str, impl: str, *, is_memory_only: bool) -> None:
    kind, shape, quantization = case.split(":")
    name, option = impl.split(":")
    if name == "unsloth":
        import unsloth  # noqa: F401  # pyright: ignore[reportMissingImports]  (must come before torch's other users)
    if name == "rlbench":
        use_expandable_segments()  # as `python -m rlbench` does
    import torch

    before = 0.0 if is_memory_only else matmul_tflops()
    torch.cuda.empty_cache()
    batch = make_batch(kind, 1000)
    step = STEPS[name](random_model(shape, quantization), quantization, kind, option, batch)

    def report(metric: str, value: float, unit: str) -> None:
        row = {"case": case.replace(":", ", "), "impl": impl, "metric": metric, "value": value, "unit": unit}
        print("ROW " + json.dumps(row), flush=True)

    start = time.perf_counter()
    for number in range(1, WARM_UP + 1):
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(f"warm-up: {number} steps after {seconds:.1f} s", file=sys.stderr, flush=True)
        if seconds > MAX_WARM_UP_S or is_memory_only:
            break
    report("resident", torch.cuda.memory_allocated() / 2**20, "MiB")
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < (1 if is_memory_only else TIMED) and sum(times) < MAX_TIMED_S:
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    report("peak", torch.cuda.max_memory_allocated() / 2**20, "MiB")
    report("reserved", torch.cuda.max_memory_reserved() / 2**20, "MiB")
    if is_memory_only:
        return
    seconds = statistics.median(times)
    report("step", 1e3 * seconds, "ms")
    report("step, slowest", 1e3 * max(times), "ms")
    report("tokens", batch.num_tokens / seconds, "tokens/s")
    if os.environ.get("RLBENCH_PROFILE"):
        profile(step)
    torch.cuda.empty_cache()
    after = matmul_tflops()
    report("matmul rate", before, "TFLOP/s")
    if not batch.prompts:
        floor = 4 * num_weights(shape) * batch.num_tokens / (before * 1e12)
        report("share of the floor", floor / seconds, "fraction")
    if abs(after / before - 1) > 0.03:
        report("matmul rate after, differs by more than 3%", after, "TFLOP/s")


def profile(step: Step) -> None:
    """The kernels that take most of a step, to stderr."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
    averages = found.key_averages()
    print(averages.table(sort_by="self_device_time_total", row_limit=45, max_name_column_width=90), file=sys.stderr)
    print(averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60), file=sys.stderr)


def run_case(case: str, impl: str, timeout_s: float, *options: str) -> list[dict[str, Any]]:
    """Its rows; a last one with the error if it did not finish."""
    command = [sys.executable, __file__, "--worker", case, impl, *options]
    rows, failure, lines = rows_of_process(command, timeout_s)
    shown = {row["metric"]: row["value"] for row in rows}
    print(f"{case} {impl}: " + ", ".join(f"{k} {v:.4g}" for k, v in shown.items()), flush=True)
    for line in lines:
        if line.startswith("Derivation"):
            print(line, flush=True)
    if os.environ.get("RLBENCH_PROFILE"):
        Path(os.environ["RLBENCH_PROFILE"], re.sub("[^a-z0-9.]", "_", f"{case}_{impl}.txt")).write_text(
            "\n".join(lines)
        )
    if failure:
        print(f"did not finish ({failure}):\n" + "\n".join(lines[-12:]), flush=True)
        last = next((line for line in reversed(lines) if "Error" in line), "")[-300:]
        rows.append({"case": case.replace(":", ", "), "impl": impl, "error": f"{failure}; {last}"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "IMPL"))
    parser.add_argument("--make", metavar="SHAPE:QUANTIZATION")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--impls", default=IMPLS)
    parser.add_argument("--timeout-s", type=float, default=150)
    parser.add_argument("--commit", default="")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step_h100.json")
    arguments = parser.parse_args()
    if arguments.worker:
        run_worker(*arguments.worker, is_memory_only=arguments.memory)
        return
    if arguments.make:
        random_model(*arguments.make.split(":"))
        return
    rows: list[dict[str, Any]] = []
    for case in arguments.cases.split(","):
        _, shape, quantization = case.split(":")
        # in a process of its own: what it allocates must not count
        subprocess.run([sys.executable, __file__, "--make", f"{shape}:{quantization}"], check=True)
        for impl in arguments.impls.split(","):
            rows += run_case(case, impl, arguments.timeout_s, *(["--memory"] if arguments.memory else []))
            command = f"python scripts/bench_step.py --cases {arguments.cases} --impls {arguments.impls}"
            write_result(arguments.output, rows, command + " --memory" * arguments.memory, arguments.commit)


if __name__ == "__main__":
    main()
