"""The host's work for one decoder layer's forward and backward pass: kernel launches, torch operations, seconds.

usage: python kernels/benchmarks/bench_host.py [--tokens 64] [--out FILE.json]
On a GPU the seconds are those until all is enqueued, without waiting for the device. Without a GPU launches return at
once and nothing is computed: the counts are those of the Triton path, the seconds leave Triton's own out.

The layer is Qwen2.5-1.5B's over NF4 with rank 16, q, k, v and gate, up as rows of fused matrices, adapters cast before.
Attention itself is left out: it is a library's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rlbench_kernels
from rlbench_kernels import (
    Lora,
    Nf4Weight,
    add_rms_norm,
    apply_rope,
    forked_rms_norm,
    lora_linear,
    lora_mlp,
    lora_qkv,
    quantize_nf4,
)
from rlbench_kernels.lora_matmuls import Adapters, cast_adapters

SHAPE = {"hidden": 1536, "heads": 12, "kv_heads": 2, "head_dim": 128, "intermediate": 8960, "rank": 16}
SMALL = {"hidden": 128, "heads": 2, "kv_heads": 1, "head_dim": 64, "intermediate": 256, "rank": 16}
EPS, SCALING = 1e-6, 2.0


class Layer:
    """One decoder layer as `rlbench.models.patch` calls the kernels."""

    def __init__(
        self, device: str, *, hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, rank: int
    ) -> None:
        self.head_dim = head_dim
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.qkv = fused_rows(sizes, hidden, device)
        self.gate, self.up = fused_rows([intermediate] * 2, hidden, device)
        (self.o,), (self.down,) = (fused_rows([hidden], depth, device) for depth in (sizes[0], intermediate))
        bases = [*self.qkv, self.o, self.gate, self.up, self.down]
        self.loras = [new_lora(base, rank, device) for base in bases]
        self.biases = [torch.zeros(size, device=device, dtype=torch.bfloat16) for size in sizes]
        self.norms = [torch.ones(hidden, device=device, dtype=torch.bfloat16) for _ in range(2)]
        self.casts = [cast(part) for part in (self.loras[:3], self.loras[3:4], self.loras[4:6], self.loras[6:])]
        # "auto" is decided by the device: on a CPU those of a GPU are named
        self.forms = ("auto", "auto") if device == "cuda" else ("accumulate", "extended")

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[1, T, D] -> [1, T, D]; cos, sin [T, d]."""
        (of_qkv, of_o, of_inner, of_down), (form, mlp_form) = self.casts, self.forms
        normed, x = forked_rms_norm(x, self.norms[0], EPS)
        projected = lora_qkv(normed.squeeze(0), self.qkv, self.loras[:3], self.biases, form=form, cast=of_qkv)
        q, k, v = (y.view(len(y), -1, self.head_dim) for y in projected)
        attended: Any = _NoAttention.apply(*apply_rope(q, k, cos, sin), v)
        mixed = lora_linear(attended.reshape(*x.shape[:2], -1), self.o, *self.loras[3], form=form, cast=of_o)
        normed, residual = add_rms_norm(mixed, x, self.norms[1], EPS)
        casts = of_inner, of_down
        options: dict[str, Any] = {"form": mlp_form, "overwrite": True, "casts": casts}
        return residual + lora_mlp(normed, self.gate, self.up, self.down, self.loras[4:], **options)


class _NoAttention(torch.autograd.Function):
    """q [T, H, d], with gradients of the right shapes to k and v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(k, v)
        return q

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, *ctx.saved_tensors


def fused_rows(sizes: Sequence[int], depth: int, device: str) -> list[Nf4Weight]:
    """Matrices [size, depth] that are rows of one."""
    whole = quantize_nf4(torch.randn(sum(sizes), depth, device=device, dtype=torch.bfloat16) * 0.02)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [whole.rows(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def new_lora(base: Nf4Weight, rank: int, device: str) -> Lora:
    a, b = (torch.randn(shape, device=device) * 0.01 for shape in ((rank, base.shape[1]), (base.shape[0], rank)))
    return Lora(a.requires_grad_(), b.requires_grad_(), SCALING)


def cast(loras: Sequence[Lora]) -> Adapters:
    tensors = [tensor.detach() for lora in loras for tensor in lora[:2]]
    like = torch.empty(0, device=tensors[0].device, dtype=torch.bfloat16)
    return cast_adapters(tensors, [lora.scaling for lora in loras], tensors[0].shape[1], like)


def layer_pass(device: str, num_tokens: int, shape: dict[str, int]) -> Callable[[], None]:
    """A call that runs forward and backward once; gradients are handed over, not accumulated."""
    layer = Layer(device, **shape)
    x, grad = (torch.randn(1, num_tokens, shape["hidden"], device=device).bfloat16() for _ in range(2))
    cos, sin = (torch.ones(num_tokens, shape["head_dim"], device=device, dtype=torch.bfloat16) for _ in range(2))
    leaves = [x.requires_grad_(), *(tensor for lora in layer.loras for tensor in lora[:2])]

    def run() -> None:
        torch.autograd.grad(layer(x, cos, sin), leaves, grad)

    return run


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations_of(call: Callable[[], object]) -> Counter[str]:
    """How often each torch operator runs."""
    counts: Counter[str] = Counter()
    with _Operations(counts):
        call()
    return counts


@contextmanager
def counted_launches(*, is_stub: bool) -> Iterator[Counter[str]]:
    """Counts Triton's launches by kernel; a stub returns at once, and lets tensors on a CPU through."""
    from triton.runtime.jit import JITFunction

    for module in pkgutil.iter_modules(rlbench_kernels.__path__):
        if module.name.endswith("_triton"):  # kernels that are imported under TRITON_INTERPRET are others
            importlib.import_module(f"rlbench_kernels.{module.name}")
    counts: Counter[str] = Counter()
    real, before = JITFunction.run, {name: os.environ.get(name) for name in ("RLBENCH_KERNELS", "TRITON_INTERPRET")}

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts[self.fn.__name__] += 1
        return None if is_stub else real(self, *args, **kwargs)

    JITFunction.run = run
    if is_stub:
        os.environ |= {"RLBENCH_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    try:
        yield counts
    finally:
        JITFunction.run = real
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def count(num_tokens: int, shape: dict[str, int], device: str) -> dict[str, Counter[str]]:
    """Of one layer pass: "launches" by Triton kernel, "operations" by torch operator."""
    run = layer_pass(device, num_tokens, shape)
    with counted_launches(is_stub=device == "cpu") as launches:
        run()
        launches.clear()
        operations = operations_of(run)
    return {"launches": launches, "operations": operations}


def host_seconds(num_tokens: int, shape: dict[str, int], device: str, repeats: int = 200) -> list[float]:
    """Of each of `repeats` layer passes, after ten others."""
    run = layer_pass(device, num_tokens, shape)
    times = []
    with counted_launches(is_stub=True) if device == "cpu" else nullcontext():
        for index in range(repeats + 10):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if index >= 10:
                times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="few: the device must not be what is waited for")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # without a GPU matmuls run on the CPU: tiny ones
    shape, num_tokens = (SHAPE, arguments.tokens) if device == "cuda" else (SMALL, 16)
    torch.set_num_threads(1)
    counts = count(num_tokens, shape, device)
    low, median, high = (q * 1e3 for q in _quantiles(host_seconds(num_tokens, shape, device)))
    result = {
        "command": "python kernels/benchmarks/bench_host.py",
        "device": torch.cuda.get_device_name() if device == "cuda" else "none: launches are counted, not made",
        "torch": torch.__version__, "shape": shape, "tokens": num_tokens,
        "host_ms": {"median": median, "p20": low, "p80": high},
        **{f"num_{name}": found.total() for name, found in counts.items()},
        **{name: dict(found.most_common()) for name, found in counts.items()},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def _quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    fifths = statistics.quantiles(times, n=5)
    return fifths[0], statistics.median(times), fifths[3]


if __name__ == "__main__":
    main()
