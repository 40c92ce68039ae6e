"""Where the gap between a bfloat16 engine and a bfloat16 trainer comes from: each kind of rounding alone.

    python scripts/measure_rounding.py [--output scripts/results/rounding_cpu.json]

A float32 SmolLM2-135M-Instruct (its weights are exact in bfloat16) scores about 1,500 tokens that it sampled itself at
temperature 1; then the outputs of one kind of module are rounded to bfloat16, and |difference| is measured. Last the
bfloat16 model, with float32 and with bfloat16 logits. Two bfloat16 implementations that round independently are
sqrt(2) times one's own distance apart: what remains between engine and trainer when both are right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_generation import model_folder
from bench_rounds import write_result

NUM_PROMPTS, MAX_TOKENS = 24, 64
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS: dict[str, tuple[str, ...]] = {
    "outputs of linear layers": ("linear",),
    "outputs of norms": ("norm",),
    "inputs of o_proj and down_proj": ("inner",),
    "residual after each layer": ("residual",),
    "all of these": ("linear", "norm", "inner", "residual"),
}


def rounded(value: Any) -> Any:
    import torch

    if isinstance(value, tuple):
        return tuple(rounded(part) for part in value)
    return value.bfloat16().float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@contextmanager
def rounding(model: Any, kinds: Sequence[str]) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        is_rounded = (
            ("linear" in kinds and leaf in LINEAR)
            or ("norm" in kinds and leaf.endswith("norm"))
            or ("residual" in kinds and type(module).__name__ == "LlamaDecoderLayer")
        )
        if is_rounded:
            handles.append(module.register_forward_hook(lambda _module, _inputs, output: rounded(output)))
        if "inner" in kinds and leaf in ("o_proj", "down_proj"):
            handles.append(module.register_forward_pre_hook(lambda _module, inputs: rounded(inputs)))
    yield
    for handle in handles:
        handle.remove()


def scores(model: Any, sequences: Sequence[tuple[list[int], list[int]]], *, bf16_logits: bool = False) -> Any:
    """float32 [N]: logprobs of all completion tokens."""
    import torch

    found = []
    for prompt, completion in sequences:
        token_ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            hidden = model.model(token_ids).last_hidden_state[0, len(prompt) - 1 : -1].float()
            logits = hidden @ model.lm_head.weight.float().T
        logits = rounded(logits) if bf16_logits else logits
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(found)


def sample(engine: Any) -> list[tuple[list[int], Any]]:
    """(prompt, completion) of every prompt."""
    from transformers import AutoTokenizer

    from rlbench.records import SamplingParams

    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder())
    texts = [
        f"A box holds {3 + i} pens and costs ${i % 9 + 1}. Ann buys {i % 7 + 2}. Explain." for i in range(NUM_PROMPTS)
    ]
    chats = [[{"role": "user", "content": text}] for text in texts]
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in rendered]
    completions = engine.generate(prompts, SamplingParams(max_tokens=MAX_TOKENS), list(range(NUM_PROMPTS)))
    return list(zip(prompts, completions, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "rounding_cpu.json")
    arguments = parser.parse_args()
    import torch

    from rlbench.engine.hf_engine import HfEngine
    from rlbench.models.base import load_base

    model = load_base(model_folder(), dtype=torch.float32, device="cpu")
    drawn = sample(HfEngine(model, max_num_seqs=NUM_PROMPTS))
    sequences = [(prompt, list(completion.token_ids)) for prompt, completion in drawn]
    exact = scores(model, sequences)
    rows: list[dict[str, Any]] = []

    def report(case: str, found: Any) -> None:
        gap = (found - exact).abs()
        for metric, value in (("mean", gap.mean()), ("p99", gap.quantile(0.99)), ("max", gap.max())):
            rows.append({"case": case, "impl": "", "metric": metric, "value": float(value), "unit": "nats"})
        print(f"{case:40} mean {gap.mean():.4f}  p99 {gap.quantile(0.99):.4f}  max {gap.max():.4f}", flush=True)

    print(f"{len(exact)} tokens")
    report("logits alone", scores(model, sequences, bf16_logits=True))
    for case, kinds in KINDS.items():
        with rounding(model, kinds):
            report(case, scores(model, sequences))
    model = load_base(model_folder(), dtype=torch.bfloat16, device="cpu")
    report("bfloat16 model, float32 logits", scores(model, sequences))
    report("bfloat16 model, bfloat16 logits", scores(model, sequences, bf16_logits=True))
    write_result(arguments.output, rows, ["torch", "transformers"])


if __name__ == "__main__":
    main()
