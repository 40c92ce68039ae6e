"""One optimizer step on a CPU: rlbench's packed step against PEFT + padded batches + full logits.

    python scripts/bench_step_cpu.py [--rounds 5] [--output scripts/results/step_cpu.json]

8 groups x 8 completions of 64 tokens, prompts as long as those of conf/data/gsm8k.yaml, SmolLM2-135M-Instruct, rank 16
on all linear layers, AdamW, each implementation in bfloat16 and float32; its better dtype counts. The two float32
gradients are compared first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_generation import model_folder
from bench_rounds import Worker, run_interleaved, serve, write_result

NUM_GROUPS, GROUP_SIZE, COMPLETION_TOKENS = 8, 8, 64
SEQUENCES_PER_FORWARD = 8
GRADIENT_TOLERANCE = 1e-3  # relative, float32, whole adapter


def make_samples() -> list[Any]:
    """Prompts of the default GSM8K config; completions and advantages are random."""
    import torch
    from transformers import AutoTokenizer

    from rlbench.config.schema import DataConfig, ExampleConfig
    from rlbench.data.chat import chat_messages, render
    from rlbench.data.sources import load_rows
    from rlbench.records import TrainingSample

    system = "Solve the problem with one short calculation. Write the result on a last line that starts with ####."
    examples = [
        ExampleConfig(
            "Ann has 3 bags of 4 apples and eats 2. How many apples are left?", "3 * 4 = 12, 12 - 2 = 10\n#### 10"
        ),
        ExampleConfig(
            "A book costs $8 and a pen costs $3. What do 2 books and a pen cost?", "2 * 8 = 16, 16 + 3 = 19\n#### 19"
        ),
    ]
    config = DataConfig(source="generated", system_prompt=system, examples=examples)
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    generator = torch.Generator().manual_seed(0)
    samples = []
    for group, row in zip(range(NUM_GROUPS), load_rows(config, "train").dataset, strict=False):
        _, prompt = render(chat_messages(dict(row)["question"], config), tokenizer)
        for _ in range(GROUP_SIZE):
            token_ids = torch.randint(10, 40_000, (COMPLETION_TOKENS,), generator=generator).tolist()
            advantage = float(torch.randn((), generator=generator))
            samples.append(
                TrainingSample(
                    group_id=str(group),
                    prompt_token_ids=prompt,
                    token_ids=tuple(token_ids),
                    sampling_logprobs=(-10.0,) * COMPLETION_TOKENS,
                    advantages=(advantage,) * COMPLETION_TOKENS,
                    loss_mask=(True,) * COMPLETION_TOKENS,
                )
            )
    return samples


def load(dtype: str) -> Any:
    import torch

    from rlbench.models.base import load_base

    return load_base(model_folder(), dtype=getattr(torch, dtype), device="cpu")


def rlbench_step(dtype: str) -> tuple[Any, Any]:
    """(policy's PEFT model, function that makes one step with a given optimizer)."""
    from rlbench.config.schema import AlgorithmConfig, LoraConfig
    from rlbench.data.packing import pack
    from rlbench.models.policy import Policy
    from rlbench.training.step import train_step

    policy = Policy(load(dtype), LoraConfig(rank=16), seed=0)
    samples = make_samples()

    def step(optimizer: Any) -> None:
        batches = pack(samples, tokens_per_microbatch=4096, device="cpu")
        train_step(policy, batches, optimizer, AlgorithmConfig(importance="off"), temperature=1.0, max_grad_norm=0)

    return policy.model, step


def peft_step(dtype: str) -> tuple[Any, Any]:
    import torch

    from rlbench.config.schema import LoraConfig
    from rlbench.models.lora import add_lora, unfuse_lora

    model = add_lora(load(dtype), LoraConfig(rank=16), seed=0)
    unfuse_lora(model)
    samples = make_samples()
    count = sum(len(sample.token_ids) for sample in samples)

    def forward(part: list[Any]) -> torch.Tensor:
        longest = max(len(s.prompt_token_ids) for s in part)
        pads = [longest - len(s.prompt_token_ids) for s in part]
        rows = [[0] * pad + [*s.prompt_token_ids, *s.token_ids] for pad, s in zip(pads, part, strict=True)]
        token_ids = torch.tensor(rows)
        mask = torch.tensor([[0] * pad + [1] * (longest - pad + COMPLETION_TOKENS) for pad in pads])
        logits = model(input_ids=token_ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        scores = logits[:, longest - 1 : -1].float().log_softmax(-1)
        logprobs = scores.gather(-1, token_ids[:, longest:, None])[..., 0]
        advantages = torch.tensor([s.advantages for s in part])
        ratio = torch.exp(logprobs - logprobs.detach())
        return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() / count

    def step(optimizer: Any) -> None:
        optimizer.zero_grad()
        for start in range(0, len(samples), SEQUENCES_PER_FORWARD):
            forward(samples[start : start + SEQUENCES_PER_FORWARD]).backward()
        optimizer.step()

    return model, step


STEPS = {"peft, padded, full logits": peft_step, "rlbench": rlbench_step}


def trainable(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient_difference() -> float:
    """|ours - theirs| / |theirs| over the whole adapter, float32."""
    import torch

    grads = []
    for make in STEPS.values():
        model, step = make("float32")

        class Capture(torch.optim.SGD):
            def step(self, closure: Any = None) -> None:
                grads.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))

        step(Capture(trainable(model), lr=0.0))
    return float((grads[1] - grads[0]).norm() / grads[0].norm())


def run_worker(impl: str, dtype: str) -> None:
    import torch

    from rlbench.models.device import usable_cores

    torch.set_num_threads(usable_cores())
    model, step = STEPS[impl](dtype)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-5)

    def run() -> dict[str, float]:
        start = time.perf_counter()
        step(optimizer)
        return {"step_s": time.perf_counter() - start}

    serve(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, metavar=("IMPL", "DTYPE"))
    parser.add_argument("--gradients", action="store_true", help="only compare the gradients")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step_cpu.json")
    arguments = parser.parse_args()
    if arguments.worker:
        run_worker(*arguments.worker)
        return
    if arguments.gradients:
        print(gradient_difference())
        return
    command = [sys.executable, sys.argv[0], "--gradients"]  # its memory is free again when the timing starts
    difference = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
    print(f"relative difference of the float32 gradients: {difference:.1e}")
    if difference > GRADIENT_TOLERANCE:
        sys.exit(f"the gradients differ by {difference:.1e}, expected at most {GRADIENT_TOLERANCE}: nothing is timed")
    workers = [Worker(f"{impl}|{dtype}", [impl, dtype]) for impl in STEPS for dtype in ("bfloat16", "float32")]
    run_interleaved(workers, arguments.rounds)
    rows: list[dict[str, Any]] = [{"case": "float32 adapter gradient", "impl": "rlbench", "value": difference,
                                   "metric": "relative difference to peft", "unit": ""}]  # fmt: skip
    best: dict[str, float] = {}
    for worker in workers:
        impl, dtype = worker.name.split("|")
        seconds = worker.median("step_s")
        best[impl] = min(best.get(impl, seconds), seconds)
        rows.append({"case": dtype, "impl": impl, "metric": "step", "value": round(seconds, 2), "unit": "s"})
        worker.close()
    speedup = best["peft, padded, full logits"] / best["rlbench"]
    rows.append(
        {"case": "best dtype", "impl": "rlbench", "metric": "speed-up", "value": round(speedup, 2), "unit": "x"}
    )
    print(f"rlbench {best['rlbench']:.1f} s, PEFT {best['peft, padded, full logits']:.1f} s: {speedup:.2f} x")
    write_result(arguments.output, rows, ["torch", "transformers", "peft"])


if __name__ == "__main__":
    main()
