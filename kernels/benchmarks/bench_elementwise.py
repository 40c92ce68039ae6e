"""Memory-bound operations in bf16: rlbench against its peers and the copy bandwidth of the same run.

usage: python kernels/benchmarks/bench_elementwise.py --out kernels/benchmarks/results/elementwise_DEVICE.json
16384 tokens; logits of 8192 tokens. Bytes are those that any implementation must read and write:
inputs once, outputs once. Peers that work in place get a copy of their input outside of the timing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Prepared, main, relative_error
from model_shapes import MODELS, ModelShape
from torch import Tensor

TOKENS = 16384
OPS = ("rms_norm", "add_rms_norm", "swiglu", "rope", "logprobs")
CASES = [f"{model} {op}" for model in ("Llama-3.1-8B", "Qwen2.5-7B") for op in OPS]
PROVIDERS = ("rlbench", "liger", "unsloth", "trl", "compile", "torch")
os.environ.setdefault("UNSLOTH_IS_PRESENT", "1")
EPS = 1e-5


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").bfloat16()


def differentiate(function: Callable[..., Any], leaves: list[Tensor], exact: Callable[..., Any]) -> Prepared:
    """forward without gradient, backward alone, and their errors; `function` maps the leaves to one or two results."""
    results = as_tuple(function(*leaves))
    grads = [random(*r.shape, seed=9 + i) for i, r in enumerate(results)]
    # before the peers' backward passes, some of which overwrite what they are given
    wide = [x.detach()[:512].double().requires_grad_() if len(x) >= 8192 else x.detach().double() for x in leaves]
    exact_results = as_tuple(exact(*wide))
    differentiable = [x for x in wide if x.requires_grad]
    exact_grads = torch.autograd.grad(exact_results, differentiable, [g[:512].double() for g in grads])
    found = torch.autograd.grad(results, leaves, grads, retain_graph=True)
    values = {"error/values": relative_error(results[0][:512].detach(), exact_results[0].detach())}
    values["error/gradient"] = relative_error(found[0][:512], exact_grads[0])
    assert max(v for v, _ in values.values()) < 0.02, f"wrong: {values}"

    def forward() -> object:
        with torch.no_grad():
            return function(*leaves)

    def backward() -> object:
        return torch.autograd.grad(results, leaves, grads, retain_graph=True)

    num_in, num_out = sum(size(x) for x in leaves), sum(size(r) for r in results)
    need = {"forward": num_in + num_out, "backward": 2 * num_in + num_out}
    return Prepared({"forward": forward, "backward": backward}, values, need)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float() if x.dtype == torch.bfloat16 else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def prepare(provider: str, case: str) -> Prepared:
    model, op = case.split()
    function = FUNCTIONS[op].get(provider)
    if provider in ("torch", "compile"):
        function = lambda: PLAIN[op] if provider == "torch" else torch.compile(PLAIN[op])  # noqa: E731
    if function is None:
        return Prepared({})
    return MAKE[op](function(), MODELS[model])


def make_norm(function: Callable, model: ModelShape) -> Prepared:
    weight = random(model.hidden)
    return differentiate(lambda x: function(x, weight), [random(TOKENS, model.hidden).requires_grad_()],
                         lambda x: norm(x, weight.double()))  # fmt: skip


def make_add_norm(function: Callable, model: ModelShape) -> Prepared:
    weight = random(model.hidden)

    def exact(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x + residual, weight.double()), x + residual

    leaves = [random(TOKENS, model.hidden, seed=i).requires_grad_() for i in range(2)]
    prepared = differentiate(lambda x, r: function(x, r, weight), leaves, exact)
    # backward: the sum and both gradients in, one gradient out, which serves x and the residual
    return Prepared(prepared.calls, prepared.values, dict(prepared.num_bytes) | {"backward": 4 * size(leaves[0])})


def make_swiglu(function: Callable, model: ModelShape) -> Prepared:
    leaves = [random(TOKENS, model.intermediate, seed=i).requires_grad_() for i in range(2)]
    return differentiate(function, leaves, lambda gate, up: F.silu(gate) * up)


def make_rope(function: Callable, model: ModelShape) -> Prepared:
    dim, heads = model.head_dim, (model.heads, model.kv_heads)
    q, k = (random(TOKENS, n, dim, seed=i).requires_grad_() for i, n in enumerate(heads))
    angle = torch.arange(TOKENS, device="cuda")[:, None] / 10000 ** (torch.arange(0, dim, 2, device="cuda") / dim)
    angle = torch.cat([angle, angle], -1)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    prepared = differentiate(lambda q, k: function(q, k, cos, sin), [q, k],
                             lambda q, k: rotate(q, k, cos[: len(q)].double(), sin[: len(q)].double()))  # fmt: skip
    need = 2 * (size(q) + size(k)) + size(cos)
    return Prepared(prepared.calls, prepared.values, {"forward": need, "backward": need})


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def one(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    return one(q), one(k)


def make_logprobs(function: Callable, model: ModelShape) -> Prepared:
    rows = 8192
    logits = (random(rows, model.vocabulary) * 2).requires_grad_()
    targets = torch.randint(model.vocabulary, (rows,), device="cuda")
    found = function(logits, targets)
    upstream = torch.randn(rows, device="cuda")
    wide = logits.detach()[:256].double().requires_grad_()
    exact = torch.log_softmax(wide, -1).gather(1, targets[:256, None])[:, 0]
    (exact_grad,) = torch.autograd.grad(exact, wide, upstream[:256].double())
    values = {"error/values": relative_error(found[:256].detach(), exact.detach())}
    (grad,) = torch.autograd.grad(found, logits, upstream.to(found.dtype), retain_graph=True)
    values["error/gradient"] = relative_error(grad[:256], exact_grad)
    del grad

    def forward() -> object:
        with torch.no_grad():
            return function(logits, targets)

    def backward() -> object:
        return torch.autograd.grad(found, logits, upstream.to(found.dtype), retain_graph=True)

    need = {"forward": size(logits), "backward": 2 * size(logits)}
    return Prepared({"forward": forward, "backward": backward}, values, need)


def plain_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """With the entropy, which the others compute too."""
    log_probs = torch.log_softmax(logits.float(), -1)
    plain_logprobs.entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(-1)  # type: ignore[attr-defined]
    return log_probs.gather(1, targets[:, None])[:, 0]


def rlbench(name: str) -> Callable[[], Callable]:
    def make() -> Callable:
        import rlbench_kernels as ops

        return {
            "rms_norm": lambda x, w: ops.rms_norm(x, w, EPS),
            "add_rms_norm": lambda x, r, w: ops.add_rms_norm(x, r, w, EPS),
            "swiglu": ops.swiglu,
            "rope": ops.apply_rope,
            "logprobs": lambda z, t: ops.logprobs(z, t)[0],
        }[name]

    return make


def liger(name: str) -> Callable[[], Callable]:
    def make() -> Callable:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            heads = [x.transpose(0, 1)[None].clone() for x in (q, k)]  # it rotates in place
            out = LigerRopeFunction.apply(*heads, cos[None], sin[None])
            return tuple(x[0].transpose(0, 1) for x in out)  # type: ignore

        return {
            "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False),
            "swiglu": LigerSiLUMulFunction.apply,
            "rope": rope,
        }[name]

    return make


def unsloth(name: str) -> Callable[[], Callable]:
    def make() -> Callable:
        from unsloth.kernels.cross_entropy_loss import Fast_CrossEntropyLoss
        from unsloth.kernels.rms_layernorm import Fast_RMS_Layernorm

        return {
            "rms_norm": lambda x, w: Fast_RMS_Layernorm.apply(x, w, EPS, False),
            "logprobs": lambda z, t: -Fast_CrossEntropyLoss.apply(z, t, 0, 0),
        }[name]

    return make


def trl() -> Callable:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


FUNCTIONS: dict[str, dict[str, Callable[[], Callable]]] = {
    case: {"rlbench": rlbench(case)}
    | ({"liger": liger(case)} if case in ("rms_norm", "swiglu", "rope") else {})
    | ({"unsloth": unsloth(case)} if case in ("rms_norm", "logprobs") else {})
    | ({"trl": trl} if case == "logprobs" else {})
    for case in OPS
}
PLAIN: dict[str, Callable] = {
    "rms_norm": norm,
    "add_rms_norm": lambda x, r, w: (norm(x + r, w), x + r),
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "rope": rotate,
    "logprobs": plain_logprobs,
}
MAKE = {
    "rms_norm": make_norm, "add_rms_norm": make_add_norm, "swiglu": make_swiglu, "rope": make_rope,
    "logprobs": make_logprobs,
}  # fmt: skip

if __name__ == "__main__":
    main(__doc__, PROVIDERS, CASES, prepare)
