"""Where the gap between engine and trainer comes from on a GPU: each one's distance to a float32 model, and to others.

    python scripts/measure_gap.py [--shape qwen2.5-1.5b] [--output scripts/results/gap_h200.json]

A shape with random weights in bfloat16 and an adapter of zeros, so that all compute the same function. vLLM samples 64
completions of 128 tokens; their logprobs come from vLLM while it sampled, from vLLM again when it reads them as
prompts, from transformers in bfloat16 and in float32, and from rlbench's trainer with its adapter and without. A row is
the mean |difference| of two of them.
"""

from __future__ import annotations

import argparse
import os
import random
from itertools import combinations
from pathlib import Path
from typing import Any

from bench_workers import spare_flashinfer, write_result
from random_models import SHAPES, random_model

NUM_PROMPTS, GROUP_SIZE, PROMPT_TOKENS, MAX_TOKENS = 8, 8, 200, 128


def sample(engine: Any) -> tuple[list[list[int]], list[tuple[int, ...]], Any]:
    """Prompts, completions, and the sampler's logprobs [N], N tokens of all completions."""
    import torch

    from rlbench.records import SamplingParams

    draw = random.Random(0)
    one_each = [[draw.randrange(10, 900) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_PROMPTS)]
    prompts = [prompt for prompt in one_each for _ in range(GROUP_SIZE)]
    found = engine.generate(prompts, SamplingParams(max_tokens=MAX_TOKENS), list(range(len(prompts))))
    logprobs = torch.cat([torch.tensor(completion.sampling_logprobs) for completion in found])
    return prompts, [completion.token_ids for completion in found], logprobs


def as_prompts(engine: Any, prompts: list[list[int]], completions: list[tuple[int, ...]]) -> Any:
    """[N]: vLLM's logprobs of prompts that hold the completions."""
    import torch
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    texts = [{"prompt_token_ids": [*p, *c]} for p, c in zip(prompts, completions, strict=True)]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = engine._llm.generate(texts, params, use_tqdm=False)
    return torch.tensor([
        place[token].logprob
        for output, prompt, completion in zip(found, prompts, completions, strict=True)
        for place, token in zip(output.prompt_logprobs[len(prompt) :], completion, strict=True)
    ])  # fmt: skip


def by_trainer(
    policy: Any, prompts: list[list[int]], completions: list[tuple[int, ...]], *, is_shared: bool, use_adapter: bool
) -> Any:
    """[N]: of packed sequences, the completions of a prompt beside one copy of it or each with its own."""
    from rlbench.checks.trainer_logprobs import trainer_logprobs
    from rlbench.data.packing import pack
    from rlbench.records import TrainingSample

    samples = [
        TrainingSample(
            group_id=str(i // GROUP_SIZE if is_shared else i), prompt_token_ids=tuple(prompt), token_ids=completion,
            sampling_logprobs=(0.0,) * len(completion), advantages=(0.0,) * len(completion),
            loss_mask=(True,) * len(completion),
        )
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]  # fmt: skip
    (microbatch,) = pack(samples, tokens_per_microbatch=10**6, device=policy.device)
    return trainer_logprobs(policy, microbatch, use_adapter=use_adapter)[0].cpu()


def by_transformers(folder: str, dtype: Any, prompts: list[list[int]], completions: list[tuple[int, ...]]) -> Any:
    """[N]: one sequence at a time, logits in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model = loaded.cuda().eval()
    head, found = model.lm_head.weight.float(), []
    for prompt, completion in zip(prompts, completions, strict=True):
        token_ids = torch.tensor([[*prompt, *completion]], device="cuda")
        with torch.no_grad():
            hidden = model.model(token_ids).last_hidden_state[0, len(prompt) - 1 : -1]
            logprobs = (hidden.float() @ head.T).log_softmax(-1)
        found.append(logprobs.gather(1, token_ids[0, len(prompt) :, None])[:, 0].cpu())
    return torch.cat(found)


def measure(folder: str) -> dict[str, Any]:
    """float32 [N] by the name of who computed it."""
    import torch

    from rlbench.config.schema import LoraConfig
    from rlbench.engine.vllm_engine import VllmEngine
    from rlbench.models.policy import Policy
    from rlbench.models.shared_base import bind_base

    torch.backends.cuda.matmul.allow_tf32 = False
    engine = VllmEngine(
        folder, device="cuda", dtype="bfloat16", quantization="none", max_model_len=1024, max_num_seqs=128,
        lora_rank=16, kv_cache_gib=8.0,
    )  # fmt: skip
    policy = Policy(bind_base(folder, engine.base_weights(), dtype=torch.bfloat16), LoraConfig(rank=16), seed=0)
    engine.sync(policy.adapter(), 1)
    prompts, completions, sampled = sample(engine)
    found = {"vLLM, sampling": sampled, "vLLM, as a prompt": as_prompts(engine, prompts, completions)}
    for use_adapter in (True, False):
        for is_shared in (True, False):
            words = f"trainer, {'adapter of zeros' if use_adapter else 'no adapter'}{', shared prompts' * is_shared}"
            found[words] = by_trainer(policy, prompts, completions, is_shared=is_shared, use_adapter=use_adapter)
    found["transformers, bfloat16"] = by_transformers(folder, torch.bfloat16, prompts, completions)
    found["transformers, float32"] = by_transformers(folder, torch.float32, prompts, completions)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-1.5b")
    parser.add_argument("--commit", default="")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gap_h200.json")
    options = parser.parse_args()
    spare_flashinfer()
    found = measure(random_model(options.shape, "none"))
    rows = []
    for one, other in combinations(found, 2):
        value = float((found[one] - found[other]).abs().mean())
        rows.append({"case": f"{options.shape}, none", "impl": one, "metric": f"gap to {other}", "value": value,
                     "unit": "nats"})  # fmt: skip
        print(f"{one} to {other}: {value:.4f} nats", flush=True)
    write_result(options.output, rows, f"python scripts/measure_gap.py --shape {options.shape}", options.commit)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main()
