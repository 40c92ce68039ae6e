"""The LoRA layers of one block over NF4 and bf16 matrices: rlbench against its peers.

usage: python kernels/benchmarks/bench_lora_nf4.py --out kernels/benchmarks/results/lora_nf4_DEVICE.json
`rlbench` takes the form that it chooses, its other rows the named one. NF4 is double-quantised where bitsandbytes is
there. `matmuls` are the dense matmuls without adapters and gating: forward, and gradients of the inputs.
unsloth runs with inplace=False, or its backward pass would overwrite the benchmark's input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import Prepared, extra_memory, main, relative_error
from model_shapes import MODELS, matrices, quantise_nf4
from torch import Tensor, nn

TOKENS, RANK, SCALING = (8, 1024), 16, 2.0
NUM_TOKENS = TOKENS[0] * TOKENS[1]
PARTS = {"qkv": ("q", "k", "v"), "o": ("o",), "mlp": ("gate", "up", "down")}
CASES = [f"{model} {kind} N={NUM_TOKENS} {part}" for model in MODELS for kind in ("nf4", "bf16") for part in PARTS]

Call = Callable[[Tensor], tuple[Tensor, ...]]


class Case(NamedTuple):
    """The matrices and adapters of one part of a block; `dense` holds the values that an NF4 base has."""

    part: str
    is_nf4: bool
    dense: dict[str, Tensor]
    quantised: dict[str, Any]  # Nf4Weight
    adapters: dict[str, tuple[Tensor, Tensor]]  # float32 A and B

    @property
    def names(self) -> tuple[str, ...]:
        return PARTS[self.part]


def prepare(provider: str, name: str) -> Prepared:
    if provider == "matmuls":
        return dense_matmuls(name)
    case = make_case(name)
    call = CALLS[provider](case)
    depth = case.dense[case.names[0]].shape[1]
    sizes = [len(case.dense[n]) for n in (case.names if case.part != "mlp" else ["down"])]
    torch.manual_seed(1)
    x = torch.randn(*TOKENS, depth, device="cuda").bfloat16().requires_grad_()
    grads = [torch.randn(*TOKENS, size, device="cuda").bfloat16() for size in sizes]
    leaves = [x, *(tensor for n in case.names for tensor in case.adapters[n])]

    def step() -> tuple[Tensor, ...]:
        for leaf in leaves:
            leaf.grad = None
        results = call(x)
        torch.autograd.backward(results, [g.to(y.dtype) for g, y in zip(grads, results, strict=True)])
        return results

    values = errors(case, x, step(), grads)
    assert max(value for value, _ in values.values()) < 0.05, f"wrong: {values}"
    for leaf in leaves:
        leaf.grad = None
    values |= {"extra_memory": extra_memory(step), "saved_memory": saved_memory(lambda: call(x))}
    return Prepared({"forward": lambda: call(x), "forward_backward": step}, values)


def make_case(name: str) -> Case:
    from rlbench_kernels import dequantize_nf4

    model, kind, _, part = name.split()
    dense = matrices(model, PARTS[part])
    quantised = {n: quantise_nf4(tensor)[0] for n, tensor in dense.items()} if kind == "nf4" else {}
    values = {n: dequantize_nf4(weight) for n, weight in quantised.items()} or dense
    adapters = {
        n: (
            (torch.randn(RANK, tensor.shape[1], device="cuda") * tensor.shape[1] ** -0.5).requires_grad_(),
            (torch.randn(len(tensor), RANK, device="cuda") * 0.02).requires_grad_(),
        )
        for n, tensor in dense.items()
    }
    return Case(part, kind == "nf4", values, quantised, adapters)


def dense_matmuls(name: str) -> Prepared:
    """The floor: forward and input gradients without adapters; the same for every kind of base."""
    model, kind, _, part = name.split()
    if kind != "bf16":
        return Prepared({})
    dense = matrices(model, PARTS[part])
    inputs = {n: torch.randn(NUM_TOKENS, w.shape[1], device="cuda").bfloat16() for n, w in dense.items()}
    grads = {n: torch.randn(NUM_TOKENS, len(w), device="cuda").bfloat16() for n, w in dense.items()}

    def forward() -> None:
        for n, weight in dense.items():
            torch.mm(inputs[n], weight.T)

    def both() -> None:
        forward()
        for n, weight in dense.items():
            torch.mm(grads[n], weight)

    return Prepared({"forward": forward, "forward_backward": both})


def rlbench(form: str) -> Callable[[Case], Call]:
    def make(case: Case) -> Call:
        from rlbench_kernels import Lora, lora_mlp, lora_qkv

        frozen = case.quantised if case.is_nf4 else case.dense
        bases = [frozen[n] for n in case.names]
        loras = [Lora(*case.adapters[n], SCALING) for n in case.names]
        if case.part == "mlp":
            return lambda x: (lora_mlp(x, bases[0], bases[1], bases[2], loras, form=form),)
        return lambda x: lora_qkv(x, bases, loras, form=form)

    return make


class Block(nn.Module):
    """The linear layers by the names that PEFT and unsloth look for."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.is_loaded_in_4bit = case.is_nf4
        self.act_fn = nn.SiLU()
        for name, dense in case.dense.items():
            self.add_module(f"{name}_proj", _linear(dense, case.is_nf4))


def _linear(dense: Tensor, is_nf4: bool) -> nn.Module:
    with torch.device("meta"):
        linear = nn.Linear(dense.shape[1], dense.shape[0], bias=False)
    if not is_nf4:
        linear.weight = nn.Parameter(dense, requires_grad=False)
        return linear
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    layer = Linear4bit(1, 1, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.in_features, layer.out_features = dense.shape[1], dense.shape[0]
    options: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4", "module": layer}
    weight: Any = Params4bit(dense, requires_grad=False, **options)
    layer.weight = weight.to(dense.device)  # quantises
    return layer


def peft_block(case: Case) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    names = [f"{name}_proj" for name in case.dense]
    config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=names)
    block: Any = inject_adapter_in_model(config, Block(case))
    for name, (a, b) in case.adapters.items():
        layer = getattr(block, f"{name}_proj")
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = nn.Parameter(a), nn.Parameter(b)
        case.adapters[name] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        if case.is_nf4:  # quantised from dense values a second time: take what came out
            from bitsandbytes.functional import dequantize_4bit

            weight = layer.base_layer.weight
            case.dense[name] = dequantize_4bit(weight.data, weight.quant_state)
    return block


def peft(case: Case) -> Call:
    """Eager layers under autocast, as its trainers run them with float32 adapters."""
    block = peft_block(case)
    calls: dict[str, Call] = {
        "qkv": lambda x: (block.q_proj(x), block.k_proj(x), block.v_proj(x)),
        "o": lambda x: (block.o_proj(x),),
        "mlp": lambda x: (block.down_proj(block.act_fn(block.gate_proj(x)) * block.up_proj(x)),),
    }
    return torch.autocast("cuda", torch.bfloat16)(calls[case.part])


def unsloth(case: Case) -> Call:
    from unsloth.kernels.fast_lora import apply_lora_mlp_swiglu, apply_lora_o, apply_lora_qkv

    block = peft_block(case)
    calls: dict[str, Call] = {
        "qkv": lambda x: tuple(apply_lora_qkv(block, x, inplace=False)),
        "o": lambda x: (apply_lora_o(block, x),),
        "mlp": lambda x: (apply_lora_mlp_swiglu(block, x, inplace=False),),
    }
    return calls[case.part]


def exact_results(case: Case, x: Tensor) -> tuple[Tensor, ...]:
    def projection(name: str, inputs: Tensor) -> Tensor:
        a, b = case.adapters[name]
        return inputs @ case.dense[name].double().T + SCALING * (inputs @ a.double().T) @ b.double().T

    if case.part != "mlp":
        return tuple(projection(name, x) for name in case.names)
    return (projection("down", F.silu(projection("gate", x)) * projection("up", x)),)


def errors(case: Case, x: Tensor, results: tuple[Tensor, ...], grads: list[Tensor]) -> dict[str, tuple[float, str]]:
    """To float64: values and input gradient on 256 rows, the first B's gradient on all."""
    rows = x.detach().flatten(0, 1)[:256].double().requires_grad_()
    exact = exact_results(case, rows)
    (exact_grad,) = torch.autograd.grad(exact, [rows], [g.flatten(0, 1)[:256].double() for g in grads])
    assert x.grad is not None
    values, exact_values = (torch.cat([t.detach().flatten(0, -2)[:256] for t in ts], 1) for ts in (results, exact))
    found = {
        "error/input_gradient": relative_error(x.grad.flatten(0, 1)[:256], exact_grad),
        "error/values": relative_error(values, exact_values),
    }
    if case.part != "mlp":
        a, b = case.adapters[case.names[0]]
        assert b.grad is not None
        low = x.detach().flatten(0, 1).double() @ a.detach().double().T
        exact_b = SCALING * grads[0].flatten(0, 1).double().T @ low
        found["error/b_gradient"] = relative_error(b.grad, exact_b)
    return found


def saved_memory(forward: Callable[[], tuple[Tensor, ...]]) -> tuple[float, str]:
    """What a forward pass keeps besides its results."""
    before = torch.cuda.memory_allocated()
    results = forward()
    kept = torch.cuda.memory_allocated() - before - sum(y.numel() * y.element_size() for y in results)
    return kept / 2**20, "MiB"


CALLS: dict[str, Callable[[Case], Call]] = {
    "rlbench": rlbench("auto"), "rlbench_extended": rlbench("extended"), "rlbench_accumulate": rlbench("accumulate"),
    "rlbench_two_pass": rlbench("two_pass"), "unsloth": unsloth, "peft": peft,
}  # fmt: skip

if __name__ == "__main__":
    main(__doc__, ("matmuls", *CALLS), CASES, prepare, pause_ms=4.0)
