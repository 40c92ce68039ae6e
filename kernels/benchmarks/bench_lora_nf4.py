"""NF4 dequantisation, and the LoRA layers of one block over NF4 and bf16 matrices: rlbench against its peers.

usage: python kernels/benchmarks/bench_lora_nf4.py --out kernels/benchmarks/results/lora_nf4_DEVICE.json
Each library runs in a sub-process under a time limit; what it measured until then counts. Times are of the GPU alone:
a pause on the device before each call lets the host run ahead. NF4 is double-quantised where bitsandbytes is there.
`matmuls` are the dense matmuls without adapters and gating: forward, and gradients of the inputs.
unsloth runs with inplace=False, or its backward pass would overwrite the benchmark's input.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMMAND = "python kernels/benchmarks/bench_lora_nf4.py"
TOKENS, RANK, SCALING = (8, 1024), 16, 2.0
# hidden, query, key-value and intermediate features
MODELS = {"Llama-3.1-8B": (4096, 4096, 1024, 14336), "Qwen3-4B": (2560, 4096, 1024, 9728)}
PARTS = {"qkv": ("q", "k", "v"), "o": ("o",), "mlp": ("gate", "up", "down")}
LIMITS_S = {"rlbench": 45.0, "unsloth": 50.0, "peft": 35.0}
TOTAL_S = 108.0
PACKAGES = ("torch", "triton", "bitsandbytes", "peft", "unsloth", "unsloth_zoo", "transformers")


class Case(NamedTuple):
    """One block's matrices and adapters; `dense` holds the values that an NF4 base has."""

    name: str
    is_nf4: bool
    dense: dict[str, Tensor]
    quantised: dict[str, Any]  # Nf4Weight
    adapters: dict[str, tuple[Tensor, Tensor]]  # float32 A and B


def matrices(model: str) -> dict[str, Tensor]:
    hidden, query, key, inner = MODELS[model]
    shapes = {
        "q": (query, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, query),
        "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }  # fmt: skip
    torch.manual_seed(0)
    return {name: (torch.randn(shape, device="cuda") * 0.02).bfloat16() for name, shape in shapes.items()}


def quantise(tensor: Tensor) -> Any:
    from rlbench_kernels import Nf4Weight, quantize_nf4

    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        return quantize_nf4(tensor)
    packed, state = quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)
    return Nf4Weight.from_quant_state(packed, state)


def make_case(model: str, *, is_nf4: bool) -> Case:
    from rlbench_kernels import dequantize_nf4

    dense = matrices(model)
    quantised = {name: quantise(tensor) for name, tensor in dense.items()} if is_nf4 else {}
    values = {name: dequantize_nf4(weight) for name, weight in quantised.items()} or dense
    adapters = {
        name: (
            (torch.randn(RANK, tensor.shape[1], device="cuda") * tensor.shape[1] ** -0.5).requires_grad_(),
            (torch.randn(len(tensor), RANK, device="cuda") * 0.02).requires_grad_(),
        )
        for name, tensor in dense.items()
    }
    return Case(f"{model} {'nf4' if is_nf4 else 'bf16'} N={TOKENS[0] * TOKENS[1]}", is_nf4, values, quantised, adapters)


Calls = dict[str, Callable[[Tensor], tuple[Tensor, ...]]]


def rlbench_calls(case: Case, form: str) -> Calls:
    from rlbench_kernels import Lora, lora_mlp, lora_qkv

    bases = case.quantised if case.is_nf4 else case.dense
    loras = {name: Lora(*pair, SCALING) for name, pair in case.adapters.items()}

    def projections(*names: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
        return lambda x: lora_qkv(x, [bases[n] for n in names], [loras[n] for n in names], form=form)

    def mlp(x: Tensor) -> tuple[Tensor, ...]:
        used = [loras[n] for n in PARTS["mlp"]]
        return (lora_mlp(x, bases["gate"], bases["up"], bases["down"], used, form=form),)

    return {"qkv": projections("q", "k", "v"), "o": projections("o"), "mlp": mlp}


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


def peft_calls(case: Case, _: str) -> Calls:
    """Eager layers under autocast, as its trainers run them with float32 adapters."""
    block = peft_block(case)
    autocast = torch.autocast("cuda", torch.bfloat16)
    return {
        "qkv": autocast(lambda x: (block.q_proj(x), block.k_proj(x), block.v_proj(x))),
        "o": autocast(lambda x: (block.o_proj(x),)),
        "mlp": autocast(lambda x: (block.down_proj(block.act_fn(block.gate_proj(x)) * block.up_proj(x)),)),
    }


def unsloth_calls(case: Case, _: str) -> Calls:
    from unsloth.kernels.fast_lora import apply_lora_mlp_swiglu, apply_lora_o, apply_lora_qkv

    block = peft_block(case)
    return {
        "qkv": lambda x: tuple(apply_lora_qkv(block, x, inplace=False)),
        "o": lambda x: (apply_lora_o(block, x),),
        "mlp": lambda x: (apply_lora_mlp_swiglu(block, x, inplace=False),),
    }


def exact_part(part: str, case: Case, x: Tensor) -> tuple[Tensor, ...]:
    def projection(name: str, inputs: Tensor) -> Tensor:
        a, b = case.adapters[name]
        return inputs @ case.dense[name].double().T + SCALING * (inputs @ a.double().T) @ b.double().T

    if part != "mlp":
        return tuple(projection(name, x) for name in PARTS[part])
    return (projection("down", F.silu(projection("gate", x)) * projection("up", x)),)


def errors(part: str, case: Case, x: Tensor, results: tuple[Tensor, ...], grads: list[Tensor]) -> dict[str, float]:
    """Relative Frobenius errors to float64: values and input gradient on 256 rows, the first B's gradient on all."""
    rows = x.detach().flatten(0, 1)[:256].double().requires_grad_()
    exact = exact_part(part, case, rows)
    (exact_grad,) = torch.autograd.grad(exact, [rows], [g.flatten(0, 1)[:256].double() for g in grads])
    assert x.grad is not None
    values = [torch.cat([t.detach().flatten(0, -2)[:256] for t in ts], 1) for ts in (results, exact)]
    pairs: dict[str, Any] = {"input_gradient": (x.grad.flatten(0, 1)[:256], exact_grad), "values": values}
    if part != "mlp":
        a, b = case.adapters[PARTS[part][0]]
        low = x.detach().flatten(0, 1).double() @ a.detach().double().T
        pairs["b_gradient"] = (b.grad, SCALING * grads[0].flatten(0, 1).double().T @ low)
    return {name: float((mine.double() - best).norm() / best.norm()) for name, (mine, best) in pairs.items()}


def measure_part(part: str, call: Callable[[Tensor], tuple[Tensor, ...]], case: Case) -> Iterator[tuple]:
    names = PARTS[part]
    depth, sizes = case.dense[names[0]].shape[1], [len(case.dense[n]) for n in (names if part != "mlp" else ["down"])]
    torch.manual_seed(1)
    x = torch.randn(*TOKENS, depth, device="cuda").bfloat16().requires_grad_()
    grads = [torch.randn(*TOKENS, size, device="cuda").bfloat16() for size in sizes]
    leaves = [x, *(tensor for name in names for tensor in case.adapters[name])]

    def step() -> tuple[Tensor, ...]:
        for leaf in leaves:
            leaf.grad = None
        results = call(x)
        torch.autograd.backward(results, [g.to(y.dtype) for g, y in zip(grads, results, strict=True)])
        return results

    found = errors(part, case, x, step(), grads)
    assert max(found.values()) < 0.05, f"wrong: {found}"
    for name, value in found.items():
        yield part, f"error/{name}", value, "relative"
    for leaf in leaves:
        leaf.grad = None
    for name, value in memory(step, lambda: call(x)).items():
        yield part, name, value, "MiB"
    yield part, "forward", median_ms(lambda: call(x)), "ms"
    yield part, "forward_backward", median_ms(step), "ms"


def memory(step: Callable[[], object], forward: Callable[[], tuple[Tensor, ...]]) -> dict[str, float]:
    """Peak of a step above what was there, with the gradients; and what a forward pass keeps besides its results."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    before = torch.cuda.memory_allocated()
    results = forward()
    kept = torch.cuda.memory_allocated() - before - sum(y.numel() * y.element_size() for y in results)
    return {"extra_memory": peak / 2**20, "saved_memory": kept / 2**20}


def dense_matmuls(model: str) -> Iterator[tuple]:
    """The floor: forward and input gradients without adapters."""
    dense = matrices(model)
    for part, names in PARTS.items():
        inputs = {n: torch.randn(TOKENS[0] * TOKENS[1], dense[n].shape[1], device="cuda").bfloat16() for n in names}
        grads = {n: torch.randn(len(inputs[n]), len(dense[n]), device="cuda").bfloat16() for n in names}

        def forward(names: tuple[str, ...] = names, inputs: dict[str, Tensor] = inputs) -> None:
            for n in names:
                torch.mm(inputs[n], dense[n].T)

        def both(names: tuple[str, ...] = names, grads: dict[str, Tensor] = grads, forward: Any = forward) -> None:
            forward()
            for n in names:
                torch.mm(grads[n], dense[n])

        yield part, "forward", median_ms(forward), "ms"
        yield part, "forward_backward", median_ms(both), "ms"


def dequantisers(name: str) -> Callable[[Any], Any]:
    """packed, quant_state -> dense, or Nf4Weight -> dense."""
    if name == "rlbench":
        from rlbench_kernels import dequantize_nf4

        return dequantize_nf4
    if name == "unsloth":
        from unsloth.kernels.utils import fast_dequantize

        return lambda pair: fast_dequantize(*pair)
    from bitsandbytes.functional import dequantize_4bit

    return lambda pair: dequantize_4bit(*pair)


def measure_dequantise(name: str, copy_tb_s: float) -> Iterator[tuple]:
    function, weights, num_bytes = dequantisers(name), {}, {}
    for key, tensor in matrices("Llama-3.1-8B").items():
        if name == "rlbench":
            weights[key] = quantise(tensor)
        else:
            from bitsandbytes.functional import quantize_4bit

            weights[key] = quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)
        num_bytes[key] = tensor.numel() * (0.5 + 2 + 1 / 64)
    for label, keys in {"q": "q", "k": "k", "gate": ["gate"], "down": ["down"], "layer": [*weights]}.items():
        took = median_ms(lambda keys=keys: [function(weights[key]) for key in keys], pause_ms=1.0, repeats=20)
        size = sum(num_bytes[key] for key in keys)
        yield f"dequantise {label}", "time", took, "ms"
        yield f"dequantise {label}", "copy_bandwidth_frac", size / took / 1e9 / copy_tb_s, "fraction"


def median_ms(call: Callable[[], object], repeats: int = 8, pause_ms: float = 4.0) -> float:
    times = []
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for index in range(repeats + 2):
        flush.zero_()
        torch.cuda._sleep(int(pause_ms * 1.7e6))
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if index >= 2:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def calibrate() -> dict[str, float]:
    left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    source = torch.empty(2**31, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    product, copy = median_ms(lambda: left @ right), median_ms(lambda: target.copy_(source))
    return {"matmul_tflops": 2 * 8192**3 / product / 1e9, "copy_tb_s": 2 * 2**31 / copy / 1e9}


def child(library: str, copy_tb_s: float) -> None:
    """Measure everything of one library; print each row at once; go on after a failure."""
    if library == "unsloth":
        import unsloth  # noqa: F401  # pyright: ignore[reportMissingImports]
    impl = {"peft": "bitsandbytes"}.get(library, library)
    emit(impl, "Llama-3.1-8B", lambda: measure_dequantise(impl, copy_tb_s))
    make_calls = {"rlbench": rlbench_calls, "peft": peft_calls, "unsloth": unsloth_calls}[library]
    forms = ("auto", "extended", "accumulate", "two_pass") if library == "rlbench" else ("auto",)
    for model in MODELS:
        if library == "rlbench":
            emit("matmuls", f"{model} bf16 N={TOKENS[0] * TOKENS[1]}", lambda model=model: dense_matmuls(model))
        for is_nf4 in (True, False):
            case = make_case(model, is_nf4=is_nf4)
            for form in forms:
                run_case(library if form == "auto" else f"{library}_{form}", case, make_calls, form)
            torch.cuda.empty_cache()


def run_case(impl: str, case: Case, make_calls: Callable[[Case, str], Calls], form: str) -> None:
    try:
        calls = make_calls(case, form)
    except Exception as error:
        print(f"NOTE {impl} {case.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return
    for part in PARTS:
        emit(impl, case.name, lambda part=part: measure_part(part, calls[part], case))


def emit(impl: str, case: str, measurements: Callable[[], Iterator[tuple]]) -> None:
    try:
        for part, metric, value, unit in measurements():
            row = {"case": f"{case} {part}", "impl": impl, "metric": metric, "value": value, "unit": unit}
            print("ROW " + json.dumps(row), flush=True)
    except Exception as error:
        print(f"NOTE {impl} {case}: {type(error).__name__}: {str(error)[:200]}", flush=True)


def run_child(library: str, copy_tb_s: float, timeout_s: float) -> tuple[list[dict], list[str]]:
    command = [sys.executable, __file__, "--library", library, "--copy-tb-s", str(copy_tb_s)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        output, note = done.stdout, done.stderr[-400:] if done.returncode else ""
    except subprocess.TimeoutExpired as expired:
        output, note = _text(expired.stdout), f"timed out after {timeout_s:.0f} s"
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW ")]
    notes = [line[5:] for line in output.splitlines() if line.startswith("NOTE ")]
    notes += [f"{library}: {note}"] if note else []
    for row in rows:
        print(f"{row['impl']:20} {row['case']:42} {row['metric']:22} {row['value']:10.4g} {row['unit']}")
    print(*notes, sep="\n", flush=True)
    return rows, notes


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=[*LIMITS_S])
    parser.add_argument("--copy-tb-s", type=float, default=3.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--libraries", default=",".join(LIMITS_S))
    parser.add_argument("--total-s", type=float, default=TOTAL_S)
    args = parser.parse_args()
    if args.library:
        return child(args.library, args.copy_tb_s)
    start = time.monotonic()
    calibration = calibrate()
    print(calibration, flush=True)
    torch.cuda.empty_cache()
    rows: list[dict] = []
    notes: list[str] = []
    for library in args.libraries.split(","):
        left = args.total_s - (time.monotonic() - start)
        found = run_child(library, calibration["copy_tb_s"], min(LIMITS_S[library], left)) if left > 5 else ([], [])
        rows, notes = rows + found[0], notes + (found[1] if left > 5 else [f"{library}: no time left"])
        result = {
            "command": f"{COMMAND} --libraries {args.libraries} --total-s {args.total_s}",
            "device": torch.cuda.get_device_name(), "versions": versions(), "commit": args.commit,
            "calibration": calibration, "calibration_last": calibrate(), "notes": notes, "rows": rows,
        }  # fmt: skip
        torch.cuda.empty_cache()
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(result["calibration_last"], f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
