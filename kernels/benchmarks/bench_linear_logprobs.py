"""Logprobs and entropy of target tokens from hidden states, frozen head, bf16: rlbench against its peers.

usage: python kernels/benchmarks/bench_linear_logprobs.py --out kernels/benchmarks/results/linear_logprobs_DEVICE.json
`forward_backward` ends in a clipped surrogate's gradient to hidden; Liger has a mean cross-entropy only.
`*_support` restrict the softmax to given thresholds of top_p = 0.95, `rlbench_top_p` computes them in every call;
`*_lora` have a rank-16 LoRA pair on the head and its gradients; `rlbench_sparse` is approximate: `sparse/*` is what it
keeps and leaves out. Logits are flat (random weights), llm (Zipf candidates, 1 to 2 nats) or sharp (0.1 nats).
Errors to float64: 256 rows, and the sums of their gradients over 128 rows each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from harness import Prepared, extra_memory, main, relative_error
from model_shapes import MODELS
from torch import Tensor

CASES = [
    f"{model} N={kind}"
    for model in ("Llama-3.1-8B", "Qwen2.5-7B")
    for kind in ("8192 llm", "16384 llm", "8192 flat", "8192 sharp")
]
PROVIDERS = (
    "two_matmuls", "rlbench", "rlbench_logprobs", "rlbench_sparse", "rlbench_support", "rlbench_top_p", "rlbench_lora",
    "unsloth_zoo", "trl", "liger", "cce", "compile", "compile_support", "compile_lora", "float32",
)  # fmt: skip
TOP_P, RANK = 0.95, 16
os.environ.setdefault("UNSLOTH_IS_PRESENT", "1")


class Inputs(NamedTuple):
    hidden: Tensor  # [N, D], bfloat16, with gradient
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    advantages: Tensor  # [N]


def make_inputs(case: str) -> Inputs:
    name, rows, regime = case.split()
    depth, vocabulary = MODELS[name].hidden, MODELS[name].vocabulary
    num_rows = int(rows.removeprefix("N="))
    torch.manual_seed(0)
    weight = (torch.randn(vocabulary, depth, device="cuda") * 0.02).bfloat16()
    targets = torch.randint(vocabulary, (num_rows,), device="cuda")
    advantages = torch.randn(num_rows, device="cuda")
    if regime == "flat":
        hidden = torch.randn(num_rows, depth, device="cuda")
    else:
        hidden, targets = peaked_hidden(weight, num_rows, is_sharp=regime == "sharp")
    return Inputs(hidden.bfloat16().requires_grad_(), weight, targets, advantages)


def peaked_hidden(weight: Tensor, num_rows: int, *, is_sharp: bool) -> tuple[Tensor, Tensor]:
    """Hidden states whose logits are high at 64 candidates, falling with the logarithm of their rank, and targets."""
    num_candidates = 64
    top, slope = (20.0, 5.5) if is_sharp else (17.0, 2.0)
    rank = torch.arange(1, num_candidates + 1, device="cuda")
    scores = top - slope * rank.log()
    zipf = 1.0 / torch.arange(1, len(weight) + 1, device="cuda")
    parts, chosen = [], []
    for _ in range(0, num_rows, 512):
        candidates = torch.multinomial(zipf.expand(512, -1), num_candidates)  # [512, 64], likelier tokens first
        rows = weight[candidates].float()  # [512, 64, D]
        parts.append(torch.einsum("k,nkd->nd", scores / rows[0, 0].square().sum(), rows))
        pick = torch.multinomial(scores.softmax(0).expand(512, -1), 1)
        chosen.append(candidates.gather(1, pick)[:, 0])
    return torch.cat(parts)[:num_rows], torch.cat(chosen)[:num_rows]


def surrogate(logprobs: Tensor, advantages: Tensor) -> Tensor:
    ratio = torch.exp(logprobs - logprobs.detach())
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()


def prepare(provider: str, case: str) -> Prepared:
    inputs = make_inputs(case)
    train, forward = CALLS[provider](inputs) if provider in CALLS else per_token(LOGPROBS[provider](inputs), inputs)

    def step() -> object:
        inputs.hidden.grad = None
        return train()

    def no_grad() -> object:
        with torch.no_grad():
            return forward()

    values: dict[str, tuple[float, str]] = {}
    found = step()
    if isinstance(found, Tensor):
        values = errors(inputs, found, provider)
        assert max(values["error/logprobs"][0], values["error/hidden_gradient"][0]) < 0.05, f"wrong: {values}"
        if provider.endswith("sparse"):
            values |= sparse_stats(inputs)
    step()
    inputs.hidden.grad = None
    values["extra_memory"] = extra_memory(train)
    no_grad()
    return Prepared({"forward_backward": step, "no_grad": no_grad}, values)


def errors(inputs: Inputs, logprobs: Tensor, provider: str) -> dict[str, tuple[float, str]]:
    rows = slice(256)
    hidden = inputs.hidden.detach()[rows].double().requires_grad_()
    logits = hidden @ inputs.weight.double().T
    if provider.endswith("lora"):
        a, b, scaling = adapter(inputs)
        logits = logits + scaling * (hidden @ a.double().T) @ b.double().T
    if provider.endswith(("support", "top_p")):
        is_outside = (logits < thresholds(inputs)[rows, None]).scatter(1, inputs.targets[rows, None], False)
        logits = logits.masked_fill(is_outside, -torch.inf)
    exact = torch.log_softmax(logits, -1).gather(1, inputs.targets[rows, None])[:, 0]
    surrogate(exact, inputs.advantages[:256]).backward()
    assert hidden.grad is not None and inputs.hidden.grad is not None
    gradient = inputs.hidden.grad[rows].double()
    sums = [grad.unflatten(0, (-1, 128)).sum(1) for grad in (gradient, hidden.grad)]  # [2, D]
    return {
        "error/logprobs": relative_error(logprobs[rows], exact.detach()),
        "error/hidden_gradient": relative_error(gradient, hidden.grad),
        "error/sum_of_128_rows": relative_error(*sums),
    }


def sparse_stats(inputs: Inputs) -> dict[str, tuple[float, str]]:
    from rlbench_kernels import SparseGradient, linear_logprobs

    sparse = SparseGradient()
    linear_logprobs(inputs.hidden, inputs.weight, inputs.targets, grad="sparse", sparse=sparse)
    assert sparse.stats is not None
    return {f"sparse/{name}": (float(value), "fraction") for name, value in sparse.stats._asdict().items()}


def two_matmuls(inputs: Inputs) -> tuple[Callable, Callable]:
    """The floor: logits and hidden gradient alone, in chunks of 4096 rows."""
    hidden, weight = inputs.hidden.detach(), inputs.weight
    logits, out = hidden.new_empty((4096, len(weight))), torch.empty_like(hidden)

    def run(with_gradient: bool) -> None:
        for i in range(0, len(hidden), 4096):
            torch.mm(hidden[i : i + 4096], weight.T, out=logits)
            if with_gradient:
                torch.mm(logits, weight, out=out[i : i + 4096])

    return lambda: run(True), lambda: run(False)


def thresholds(inputs: Inputs) -> Tensor:
    from rlbench_kernels import support_thresholds

    return support_thresholds(inputs.hidden, inputs.weight, top_p=TOP_P)


def adapter(inputs: Inputs) -> tuple[Tensor, Tensor, float]:
    """A [R, D] and B [V, R], float32, and the scaling."""
    generator = torch.Generator("cuda").manual_seed(1)
    (vocabulary, depth), device = inputs.weight.shape, "cuda"
    a = torch.randn(RANK, depth, generator=generator, device=device) / depth**0.5
    b = torch.randn(vocabulary, RANK, generator=generator, device=device) * 0.02
    return a.requires_grad_(), b.requires_grad_(), 2.0


def rlbench(inputs: Inputs, options: Callable[[], dict] = dict) -> tuple[Callable, Callable]:
    """`options` are made in every call."""
    from rlbench_kernels import linear_logprobs, linear_token_loss

    hidden, weight, targets, advantages = inputs

    def train() -> Tensor:
        loss, _, logprobs = linear_token_loss(
            hidden, weight, targets, lambda p, h, c: (surrogate(p, c["a"]), {"e": h.sum()}), {"a": advantages},
            **options(),
        )  # fmt: skip
        loss.backward()
        return logprobs

    return train, lambda: linear_logprobs(hidden, weight, targets, **options())


def rlbench_sparse(inputs: Inputs) -> tuple[Callable, Callable]:
    return rlbench(inputs, lambda: {"grad": "sparse"})


def rlbench_support(inputs: Inputs) -> tuple[Callable, Callable]:
    support = thresholds(inputs)
    return rlbench(inputs, lambda: {"support": support})


def rlbench_top_p(inputs: Inputs) -> tuple[Callable, Callable]:
    return rlbench(inputs, lambda: {"support": thresholds(inputs)})


def rlbench_lora(inputs: Inputs) -> tuple[Callable, Callable]:
    from rlbench_kernels import Lora

    lora = Lora(*adapter(inputs))
    return rlbench(inputs, lambda: {"lora": lora})


def liger(inputs: Inputs) -> tuple[Callable, Callable]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    op = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    hidden, weight, targets, _ = inputs
    return (lambda: op(weight, hidden, targets).backward()), (lambda: op(weight, hidden, targets))


def per_token(function: Callable[[Tensor], Tensor], inputs: Inputs) -> tuple[Callable, Callable]:
    """Calls of a function hidden -> logprobs [N]."""

    def train() -> Tensor:
        logprobs = function(inputs.hidden)
        surrogate(logprobs, inputs.advantages).backward()
        return logprobs.detach()

    return train, lambda: function(inputs.hidden)


def rlbench_logprobs(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    from rlbench_kernels import linear_logprobs

    return lambda h: linear_logprobs(h, inputs.weight, inputs.targets)[0]


def trl(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction as Op

    return lambda h: Op.apply(h, inputs.weight, None, inputs.targets, 1.0, 16384, None, 1.0, ("entropy",))[0]


def unsloth_zoo(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    from unsloth_zoo.fused_losses.fused_linear import fused_linear_logprobs

    def function(hidden: Tensor) -> Tensor:
        result = fused_linear_logprobs(
            hidden, inputs.weight, inputs.targets, return_entropy=True, entropy_requires_grad=False
        )
        return result if isinstance(result, Tensor) else result[0]

    return function


def cce(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda h: -linear_cross_entropy(h, inputs.weight, inputs.targets, reduction="none")  # type: ignore


def softmax_part(
    hidden: Tensor, weight: Tensor, targets: Tensor, support: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """logprobs and entropy through float32 logits."""
    logits = (hidden @ weight.T).float()
    if lora is not None:
        low = hidden @ lora[0].to(hidden.dtype).T
        logits = logits + (low @ (lora[2] * lora[1]).to(hidden.dtype).T).float()
    if support is not None:
        is_outside = (logits < support[:, None]).scatter(1, targets[:, None], False)
        logits = logits.masked_fill(is_outside, -1e30)  # a finite number: 0 times it is no nan
    log_probs = torch.log_softmax(logits, -1)
    entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(-1)
    return log_probs.gather(1, targets[:, None])[:, 0], entropy


def compiled(
    inputs: Inputs, support: Tensor | None = None, lora: tuple[Tensor, Tensor, float] | None = None
) -> Callable[[Tensor], Tensor]:
    """torch.compile over chunks of 1024 rows, recomputed in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    part = torch.compile(softmax_part)

    def apply(hidden: Tensor) -> Tensor:
        supports = [None] * (len(hidden) // 1024) if support is None else support.split(1024)
        chunks = zip(hidden.split(1024), inputs.targets.split(1024), supports, strict=True)
        parts = [checkpoint(part, h, inputs.weight, t, s, lora, use_reentrant=False) for h, t, s in chunks]
        return torch.cat([logprobs for logprobs, _ in parts])  # type: ignore

    return apply


def compiled_support(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    return compiled(inputs, support=thresholds(inputs))


def compiled_lora(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    return compiled(inputs, lora=adapter(inputs))


def float32(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    if len(inputs.hidden) > 8192:
        raise ValueError("full float32 logits and their gradient need more memory than is free beside the others")
    return lambda h: softmax_part(h, inputs.weight, inputs.targets)[0]


CALLS = {
    "two_matmuls": two_matmuls, "rlbench": rlbench, "rlbench_sparse": rlbench_sparse,
    "rlbench_support": rlbench_support, "rlbench_top_p": rlbench_top_p, "rlbench_lora": rlbench_lora, "liger": liger,
}  # fmt: skip
LOGPROBS = {
    "rlbench_logprobs": rlbench_logprobs, "trl": trl, "unsloth_zoo": unsloth_zoo, "cce": cce, "compile": compiled,
    "compile_support": compiled_support, "compile_lora": compiled_lora, "float32": float32,
}  # fmt: skip

if __name__ == "__main__":
    main(__doc__, PROVIDERS, CASES, prepare)
