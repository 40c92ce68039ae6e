"""Training attention over packed groups in bf16: one shared prompt a group against a prompt per completion.

usage: python kernels/benchmarks/bench_packed_attention.py --out kernels/benchmarks/results/packed_attention_DEVICE.json
4 groups. `unshared` is flash attention over prompt + completion, as many prompts as completions;
the ideal is its time times `score_frac`, the share of the score matrix that is left. Both by torch's flash attention
(`flash`) and by FlashAttention 4 (`flash4`). `gathered` and `two_calls` are the forms between which `rlbench` chooses.
`sdpa_padded` pads every completion to the longest.
"""

from __future__ import annotations

import importlib
import os
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from harness import Prepared, extra_memory, main, relative_error
from model_shapes import MODELS, ModelShape

from rlbench_kernels.packed_attention import SharedPromptLayout, packed_attention

NUM_GROUPS = 4
GROUPS = (
    "prompt 512, 16 completions of 100 to 800",
    "prompt 200, 8 completions of 50 to 1000",
    "prompt 512, 8 completions of 1500 to 2500",
    "prompt 384, 1 completions of 16000 to 16000",
    "prompt 4096, 16 completions of 50 to 150",
)
CASES = [f"{model} {group}" for model in ("Llama-3.1-8B", "Qwen2.5-7B") for group in GROUPS]
PROVIDERS = (
    "rlbench:flash4", "rlbench:flash", "gathered:flash4", "two_calls:flash4", "unshared:flash4", "unshared:flash",
    "sdpa_padded",
)  # fmt: skip


def groups_of(case: str) -> list[tuple[int, list[int]]]:
    _, _, prompt, size, _, _, low, _, high = case.replace(",", "").split()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(int(low), int(high) + 1, (NUM_GROUPS, int(size)), generator=generator).tolist()
    return [(int(prompt), completions) for completions in lengths]


def inputs(model: ModelShape, num_tokens: int) -> Any:
    """q, k and v."""
    heads = (model.heads, model.kv_heads, model.kv_heads)
    return [torch.randn(num_tokens, n, model.head_dim, device="cuda").bfloat16().requires_grad_() for n in heads]


def prepare(provider: str, case: str) -> Prepared:
    groups = groups_of(case)
    torch.manual_seed(0)
    model = MODELS[case.split()[0]]
    scale = model.head_dim**-0.5
    provider, _, os.environ["RLBENCH_ATTENTION"] = provider.partition(":")
    if provider in ("gathered", "two_calls"):
        module = importlib.import_module("rlbench_kernels.packed_attention")
        setattr(module, "_is_gathered", lambda *_: provider == "gathered")  # noqa: B010
    if provider in ("rlbench", "gathered", "two_calls"):
        leaves = inputs(model, sum(p + sum(c) for p, c in groups))
        layout = SharedPromptLayout.from_lengths(groups, "cuda")
        call = lambda: packed_attention(leaves[0], leaves[1], leaves[2], layout, scale=scale)  # noqa: E731
    elif provider == "unshared":
        lengths = [p + n for p, completions in groups for n in completions]
        leaves = inputs(model, sum(lengths))
        layout = SharedPromptLayout.from_lengths([(n, []) for n in lengths], "cuda")
        call = lambda: packed_attention(leaves[0], leaves[1], leaves[2], layout, scale=scale)  # noqa: E731
    else:
        del os.environ["RLBENCH_ATTENTION"]
        longest = max(p + max(c) for p, c in groups)
        count = sum(len(c) for _, c in groups)
        leaves = [x.view(count, longest, -1, model.head_dim).transpose(1, 2).detach().requires_grad_()
                  for x in inputs(model, count * longest)]  # fmt: skip
        call = lambda: F.scaled_dot_product_attention(*leaves, is_causal=True, scale=scale, enable_gqa=True)  # noqa: E731
    upstream = torch.randn_like(call())

    def step() -> object:
        return torch.autograd.grad(call(), leaves, upstream)

    def forward() -> object:
        with torch.no_grad():
            return call()

    values = {"extra_memory": extra_memory(step), "tokens": (float(sum(p + sum(c) for p, c in groups)), "1")}
    values["score_frac"] = (score_share(groups), "of unshared")
    if provider not in ("unshared", "sdpa_padded") and len(groups[0][1]) > 1:
        values |= gradient_errors(model, groups[0])
    return Prepared({"forward": forward, "forward_backward": step}, values)


def score_share(groups: list[tuple[int, list[int]]]) -> float:
    """Entries of the score matrix with shared prompts, over those without."""
    shared = sum(p * p / 2 + sum(n * p + n * n / 2 for n in c) for p, c in groups)
    return shared / sum((p + n) ** 2 / 2 for p, c in groups for n in c)


def gradient_errors(model: ModelShape, group: tuple[int, list[int]]) -> dict[str, tuple[float, str]]:
    """Of one group: gradients with the shared prompt against those with a prompt per completion, in float32."""
    prompt, completions = group
    leaves = inputs(model, prompt + sum(completions))
    layout = SharedPromptLayout.from_lengths([group], "cuda")
    out = packed_attention(leaves[0], leaves[1], leaves[2], layout, scale=model.head_dim**-0.5)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, upstream)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    starts = [prompt, *accumulate(completions, initial=prompt)][1:]
    loss = torch.zeros((), device="cuda")
    for start, length in zip(starts, completions, strict=False):
        rows = torch.cat([torch.arange(prompt), torch.arange(start, start + length)]).cuda()
        q, k, v = (x[rows].transpose(0, 1)[None] for x in wide)
        plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        loss = loss + (plain[prompt:] * upstream[rows[prompt:]].float()).sum()
        if start == prompt:
            loss = loss + (plain[:prompt] * upstream[:prompt].float()).sum()
    exact = torch.autograd.grad(loss, wide)
    return {f"error/d{n}": relative_error(a, b) for n, a, b in zip("qkv", grads, exact, strict=True)}


if __name__ == "__main__":
    main(__doc__, PROVIDERS, CASES, prepare)
