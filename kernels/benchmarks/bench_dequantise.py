"""NF4 and FP8 matrices of one block made dense in bf16: rlbench against its peers and the copy's bandwidth.

usage: python kernels/benchmarks/bench_dequantise.py --out kernels/benchmarks/results/dequantise_DEVICE.json
Bytes are codes and scales read once and the dense matrix written once, into memory that is there (unsloth takes new).
`layer` are all seven matrices one after the other, `reference` is rlbench in PyTorch, `compile` its FP8 formula under
torch.compile. NF4 is double-quantised where bitsandbytes is there. FP8 has one scale a row; `fp8_padded` rows are 16
codes longer than D, as in an engine's padded matrix; `fp8_tensor` has one scale a matrix. `copy` are device copies of
as many bytes, a launch a matrix too: the share of the bandwidth that these sizes allow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import Prepared, main, relative_error
from model_shapes import MATRICES, matrices, quantise_nf4
from torch import Tensor

FORMATS = ("nf4", "fp8", "fp8_padded", "fp8_tensor")
CASES = [f"{model} {kind}" for model in ("Llama-3.1-8B", "Qwen2.5-7B") for kind in FORMATS]
PROVIDERS = ("rlbench", "copy", "reference", "compile", "bitsandbytes", "unsloth")
TIMED = {"q": ("q",), "k": ("k",), "gate": ("gate",), "down": ("down",), "layer": MATRICES}


class Frozen(NamedTuple):
    weight: Any  # Nf4Weight or Fp8Weight
    pair: Any = None  # an NF4 weight as bitsandbytes' (packed, QuantState)


Dense = Callable[[Frozen, Tensor], object]  # writes the dense matrix to the given memory, or returns a new one


def prepare(provider: str, case: str) -> Prepared:
    model, kind = case.split()
    originals = matrices(model)
    frozen = {name: quantise(tensor, kind) for name, tensor in originals.items()}
    outs = {name: torch.empty_like(tensor) for name, tensor in originals.items()}
    del originals
    num_bytes = {name: bytes_of(one.weight) + outs[name].nbytes for name, one in frozen.items()}
    need = {label: float(sum(num_bytes[name] for name in names)) for label, names in TIMED.items()}
    if provider == "copy":
        return Prepared(copies(num_bytes), {}, need)
    make = DENSE[kind.partition("_")[0]].get(provider)
    if make is None:
        return Prepared({})
    dense = make()
    errors = [error(dense, frozen[name], out.fill_(torch.nan)) for name, out in outs.items()]
    limit = 0.0 if provider == "rlbench" else 0.01  # unsloth rounds FP8's scales to bf16
    assert all(found <= limit for found in errors), f"wrong: {errors}"

    def call(names: tuple[str, ...]) -> Callable[[], object]:
        return lambda: [dense(frozen[name], outs[name]) for name in names]

    calls = {label: call(names) for label, names in TIMED.items()}
    return Prepared(calls, {"error/values": (max(errors), "relative")}, need)


def copies(num_bytes: dict[str, int]) -> dict[str, Callable[[], object]]:
    """Of half of each matrix's bytes to the other half, in memory of its own."""
    pairs = {n: torch.empty((2, size // 2), dtype=torch.int8, device="cuda") for n, size in num_bytes.items()}

    def call(names: tuple[str, ...]) -> Callable[[], object]:
        return lambda: [pairs[name][1].copy_(pairs[name][0]) for name in names]

    return {label: call(names) for label, names in TIMED.items()}


def quantise(tensor: Tensor, kind: str) -> Frozen:
    from rlbench_kernels import FP8, Fp8Weight, quantize_fp8

    if kind == "nf4":
        return Frozen(*quantise_nf4(tensor))
    weight = quantize_fp8(tensor)
    if kind == "fp8_tensor":
        scale = tensor.float().abs().max() / 448
        return Frozen(Fp8Weight((tensor.float() / scale).to(FP8), scale.expand(len(tensor), 1), tensor.dtype))
    if kind == "fp8_padded":
        stored = F.pad(weight.codes.view(torch.uint8), (0, 16)).view(FP8)
        return Frozen(Fp8Weight(stored[:, : tensor.shape[1]], weight.scale, weight.dtype))
    return Frozen(weight)


def error(dense: Dense, frozen: Frozen, out: Tensor) -> float:
    """To the PyTorch references in bf16, which the tests compare with bitsandbytes and float64."""
    from rlbench_kernels import Nf4Weight, fp8, nf4

    found = dense(frozen, out)
    module: Any = nf4 if isinstance(frozen.weight, Nf4Weight) else fp8
    expected = module.reference_dequantize(frozen.weight, torch.empty_like(out))
    return relative_error(found if isinstance(found, Tensor) else out, expected)[0]


def bytes_of(weight: Any) -> int:
    """Of codes and scales."""
    from rlbench_kernels import Fp8Weight

    if isinstance(weight, Fp8Weight):
        return weight.codes.numel() + 4 * (len(weight.scale) if weight.scale.stride(0) else 1)
    nested = 0 if weight.nested is None else weight.nested.absmax.nbytes
    return weight.packed.nbytes + weight.absmax.nbytes + nested


def rlbench() -> Dense:
    from rlbench_kernels import Nf4Weight, dequantize_fp8, dequantize_nf4

    def dense(one: Frozen, out: Tensor) -> object:
        weight = one.weight
        return dequantize_nf4(weight, out) if isinstance(weight, Nf4Weight) else dequantize_fp8(weight, out)

    return dense


def reference(kind: str) -> Callable[[], Dense]:
    def make() -> Dense:
        from rlbench_kernels import fp8, nf4

        module: Any = {"nf4": nf4, "fp8": fp8}[kind]
        return lambda one, out: module.reference_dequantize(one.weight, out)

    return make


def compiled() -> Dense:
    torch.compiler.reset()  # or cases would share the limit of shapes
    function = torch.compile(lambda codes, scale, out: out.copy_(codes.float() * scale), dynamic=False)
    return lambda one, out: function(one.weight.codes, one.weight.scale, out)


def bitsandbytes() -> Dense:
    from bitsandbytes.functional import dequantize_4bit

    return lambda one, out: dequantize_4bit(*one.pair, out=out)


def unsloth_nf4() -> Dense:
    from unsloth.kernels.utils import fast_dequantize

    return lambda one, _: fast_dequantize(*one.pair)


def unsloth_fp8() -> Dense:
    from unsloth.kernels.fp8 import weight_dequant

    return lambda one, _: weight_dequant(one.weight.codes, one.weight.scale, one.weight.dtype)


DENSE: dict[str, dict[str, Callable[[], Dense]]] = {
    "nf4": {
        "rlbench": rlbench, "reference": reference("nf4"), "bitsandbytes": bitsandbytes, "unsloth": unsloth_nf4,
    },
    "fp8": {"rlbench": rlbench, "reference": reference("fp8"), "compile": compiled, "unsloth": unsloth_fp8},
}  # fmt: skip

if __name__ == "__main__":
    main(__doc__, PROVIDERS, CASES, prepare)
