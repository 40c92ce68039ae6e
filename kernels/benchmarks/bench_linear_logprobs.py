"""Logprob + entropy + clipped-surrogate backward to hidden, frozen head, bf16: rlbench against its peers.

usage: python kernels/benchmarks/bench_linear_logprobs.py --out kernels/benchmarks/results/DEVICE.json
Each implementation runs in a sub-process: first its error against float64 on 256 rows, then the times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

COMMAND = "python kernels/benchmarks/bench_linear_logprobs.py"
SHAPES = {"Llama-3.1-8B": (4096, 128256), "Qwen2.5-7B": (3584, 152064)}
ROWS = (8192, 16384)
ENV = {"unsloth_zoo": {"UNSLOTH_IS_PRESENT": "1"}}
IMPLS = ("two_matmuls", "rlbench", "unsloth_zoo", "trl", "liger", "compile", "cce")


def surrogate(logprobs: Tensor, advantages: Tensor) -> Tensor:
    ratio = torch.exp(logprobs - logprobs.detach())
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()


def rlbench(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Callable[..., object], Callable[..., object]]:
    from rlbench_kernels import linear_logprobs, linear_token_loss

    def train(advantages: Tensor) -> Tensor:
        loss, _, logprobs = linear_token_loss(
            hidden, weight, targets, lambda p, h, c: (surrogate(p, c["a"]), {"e": h.sum()}), {"a": advantages}
        )
        loss.backward()
        return logprobs

    return train, lambda: linear_logprobs(hidden, weight, targets)


def per_token(function: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Callable, Callable]]:
    """train and no-gradient calls of a function hidden -> logprobs [N]."""

    def make(hidden: Tensor) -> tuple[Callable, Callable]:
        def train(advantages: Tensor) -> Tensor:
            logprobs = function(hidden)
            surrogate(logprobs, advantages).backward()
            return logprobs.detach()

        return train, lambda: function(hidden)

    return make


def build(name: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Callable, Callable]:
    if name == "rlbench":
        return rlbench(hidden, weight, targets)
    if name == "two_matmuls":
        return two_matmuls(hidden, weight)
    if name == "trl":
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction as Op

        apply = lambda h: Op.apply(h, weight, None, targets, 1.0, 16384, None, 1.0, ("entropy",))[0]  # noqa: E731
    elif name == "unsloth_zoo":
        from unsloth_zoo.fused_losses.fused_linear import fused_linear_logprobs

        apply = lambda h: _first(fused_linear_logprobs(h, weight, targets, return_entropy=True))  # noqa: E731
    elif name == "cce":
        from cut_cross_entropy import linear_cross_entropy

        apply = lambda h: -linear_cross_entropy(h, weight, targets, reduction="none")  # noqa: E731
    elif name == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        op = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return (lambda a: op(weight, hidden, targets).backward()), (lambda: op(weight, hidden, targets))
    else:
        apply = compiled(weight, targets)
    return per_token(apply)(hidden)


def _first(result: object) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]  # type: ignore[index]


def compiled(weight: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """torch.compile of float32 softmax over chunks of 1024 rows, recomputed in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    @torch.compile
    def part(hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        scores = (hidden @ weight.T).float()
        log_probs = torch.log_softmax(scores, -1)
        entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(-1)
        return log_probs.gather(1, chosen[:, None])[:, 0], entropy

    def apply(hidden: Tensor) -> Tensor:
        parts = zip(hidden.split(1024), targets.split(1024), strict=True)
        return torch.cat([checkpoint(part, h, t, use_reentrant=False)[0] for h, t in parts])  # type: ignore[index]

    return apply


def two_matmuls(hidden: Tensor, weight: Tensor) -> tuple[Callable, Callable]:
    logits = hidden.new_empty((4096, len(weight)))
    out, plain = torch.empty_like(hidden), hidden.detach()

    def train(_: Tensor) -> None:
        for i in range(0, len(plain), 4096):
            torch.mm(plain[i : i + 4096], weight.T, out=logits)
            torch.mm(logits, weight, out=out[i : i + 4096])

    def forward() -> None:
        for i in range(0, len(plain), 4096):
            torch.mm(plain[i : i + 4096], weight.T, out=logits)

    return train, forward


def median_ms(call: Callable[[], object], repeats: int = 12) -> float:
    times = []
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for index in range(repeats + 3):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if index >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def errors(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, logprobs: Tensor) -> dict[str, float]:
    """Relative Frobenius errors to float64 of the first 256 rows."""
    exact_hidden = hidden.detach()[:256].double().requires_grad_()
    exact = torch.log_softmax(exact_hidden @ weight.double().T, -1).gather(1, targets[:256, None])[:, 0]
    surrogate(exact, advantages[:256]).backward()
    assert hidden.grad is not None and exact_hidden.grad is not None
    pairs = {"logprobs": (logprobs[:256], exact.detach()), "hidden_gradient": (hidden.grad[:256], exact_hidden.grad)}
    return {k: float((a.double() - b).norm() / b.norm()) for k, (a, b) in pairs.items()}


def measure(name: str, case: str, rows: int) -> list[dict]:
    depth, vocabulary = SHAPES[case]
    torch.manual_seed(0)
    hidden = torch.randn(rows, depth, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, depth, device="cuda") * 0.02).bfloat16()
    targets, advantages = torch.randint(vocabulary, (rows,), device="cuda"), torch.randn(rows, device="cuda")
    train, forward = build(name, hidden, weight, targets)
    results: dict[str, tuple[float, str]] = {}
    logprobs = train(advantages)
    if isinstance(logprobs, Tensor):
        found = errors(hidden, weight, targets, advantages, logprobs)
        assert max(found.values()) < 0.05, f"{name} is wrong: {found}"
        results |= {f"error/{k}": (v, "relative") for k, v in found.items()}

    def step() -> None:
        hidden.grad = None
        train(advantages)

    step()
    hidden.grad = None
    torch.cuda.synchronize()
    resident = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train(advantages)
    results["extra_memory"] = ((torch.cuda.max_memory_allocated() - resident) / 2**20, "MiB")
    results["forward_backward"] = (median_ms(step), "ms")
    with torch.no_grad():
        results["no_grad"] = (median_ms(forward), "ms")
    label = f"{case} N={rows}"
    return [{"case": label, "impl": name, "metric": k, "value": v, "unit": u} for k, (v, u) in results.items()]


def calibrate() -> dict[str, float]:
    left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    source = torch.empty(2**31, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    product, copy = median_ms(lambda: left @ right), median_ms(lambda: target.copy_(source))
    return {"matmul_tflops": 2 * 8192**3 / product / 1e9, "copy_tb_s": 2 * 2**31 / copy / 1e9}


def child(name: str) -> None:
    for case in SHAPES:
        for rows in ROWS:
            for row in measure(name, case, rows):
                print("ROW " + json.dumps(row), flush=True)
            torch.cuda.empty_cache()


def run_child(name: str, timeout_s: float) -> list[dict]:
    command = [sys.executable, __file__, "--impl", name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False, env=os.environ | ENV.get(name, {})
        )
        output, note = done.stdout, done.stderr[-400:] if done.returncode else ""
    except subprocess.TimeoutExpired as expired:
        output, note = (expired.stdout or b"").decode(), "timed out"
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW ")]
    print(name, note, *(f"\n  {r['case']} {r['metric']} {r['value']:.5g} {r['unit']}" for r in rows), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", choices=IMPLS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--impls", default=",".join(IMPLS))
    parser.add_argument("--timeout-s", type=float, default=90)
    args = parser.parse_args()
    if args.impl:
        return child(args.impl)
    rows: list[dict] = []
    calibration = calibrate()
    torch.cuda.empty_cache()
    for name in args.impls.split(","):
        rows += run_child(name, args.timeout_s)
        result = {
            "command": f"{COMMAND} --impls {args.impls} --timeout-s {args.timeout_s}",
            "device": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "triton": version("triton")}, "commit": args.commit,
            "calibration": calibration, "rows": rows,
        }  # fmt: skip
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
