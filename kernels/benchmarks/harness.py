"""Side-by-side timing on one GPU: every library in a process of its own, rounds interleaved, medians, one JSON file.

A benchmark is a list of providers and cases and a function `prepare(provider, case) -> Prepared`. All workers start
together; for each case they answer in turn, A B C, A B C, ... A provider that fails or takes too long is listed in
`notes` with its error. Times are of the GPU alone: a pause on the device before each call lets the host run ahead.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "trl", "liger-kernel", "cut-cross-entropy", "unsloth",
    "unsloth-zoo", "flash-attn-4",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prepared:
    """One provider on one case."""

    calls: Mapping[str, Callable[[], object]]  # timed, by metric
    values: Mapping[str, tuple[float, str]] = field(default_factory=dict)  # measured once: (value, unit)
    num_bytes: Mapping[str, float] = field(default_factory=dict)  # that a call must read and write, by metric


Prepare = Callable[[str, str], Prepared]


def median_ms(call: Callable[[], object], *, repeats: int = 6, pause_ms: float = 1.0) -> float:
    """Median GPU time; the L2 cache is flushed before each call."""
    times = []
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for index in range(repeats + 1):
        flush.zero_()
        torch.cuda._sleep(int(pause_ms * 1.7e6))
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if index:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def extra_memory(call: Callable[[], object]) -> tuple[float, str]:
    """Peak of the call above what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20, "MiB"


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> tuple[float, str]:
    """Frobenius norm of the difference over that of the exact values."""
    return float((found.double() - exact.double()).norm() / exact.double().norm()), "relative"


def calibrate() -> dict[str, float]:
    """bf16 matmul of 8192^3 on random data, and a copy of 2 GiB counting bytes read and written."""
    left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    source = torch.empty(2**31, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    product, copy = median_ms(lambda: left @ right), median_ms(lambda: target.copy_(source))
    return {"matmul_tflops": 2 * 8192**3 / product / 1e9, "copy_tb_s": 2 * 2**31 / copy / 1e9}


def main(
    doc: str | None, providers: Sequence[str], cases: Sequence[str], prepare: Prepare, *, pause_ms: float = 1.0
) -> None:
    """Command line of a benchmark file: the parent, or with --worker one provider."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=providers)
    parser.add_argument("--providers", default=",".join(providers))
    parser.add_argument("--cases", default=";".join(cases))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=60.0, help="of one provider's first answer on a case")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.worker, prepare, pause_ms)
    else:
        measure(arguments)


def serve(provider: str, prepare: Prepare, pause_ms: float) -> None:
    """Answer each case name on stdin with the medians of its calls, the first time with its values too."""
    with only_answers() as answer:
        if provider.startswith("unsloth"):
            import unsloth  # noqa: F401  # pyright: ignore[reportMissingImports]  (must come before transformers)
        answer({"ready": True})
        current, prepared = "", Prepared({})
        for line in sys.stdin:
            try:
                values: Mapping[str, Any] = {}
                if line.strip() != current:
                    prepared = Prepared({})
                    torch.cuda.empty_cache()
                    current = line.strip()
                    prepared = prepare(provider, current)
                    torch.cuda.empty_cache()  # what the error check needed
                    values = dict(prepared.values) | {f"{k}/bytes": (v, "B") for k, v in prepared.num_bytes.items()}
                times = {name: median_ms(call, pause_ms=pause_ms) for name, call in prepared.calls.items()}
                answer({"values": values, "times": times})
            except Exception as error:
                prepared = Prepared({})
                answer({"error": f"{type(error).__name__}: {str(error)[:300]}"})


@contextmanager
def only_answers() -> Iterator[Callable[[dict], None]]:
    """What libraries print goes to stderr; the yielded function writes one JSON line to the real stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    yield lambda record: print(json.dumps(record), file=out, flush=True)


class Worker:
    """Parent side of one provider."""

    def __init__(self, provider: str, limit_s: float) -> None:
        self.provider, self._limit_s = provider, limit_s
        self.note = ""
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, sys.argv[0], "--worker", provider],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0,
        )  # fmt: skip

    def ask(self, case: str) -> dict[str, Any] | None:
        """The answer to a case ("" waits for the start), or None, with `note` saying why."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if self.note:
            return None
        if case:
            self._process.stdin.write(f"{case}\n".encode())
        if not select.select([self._process.stdout], [], [], self._limit_s)[0]:
            self._process.kill()
            self.note = f"timed out after {self._limit_s:.0f} s"
            return None
        line = self._process.stdout.readline()
        if not line:
            self.note = f"ended: {self._last_error()}"
            return None
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").split("\n") if line.strip()]
        return lines[-1][:300] if lines else "nothing on stderr"


def measure(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    first = calibrate()
    print(first, flush=True)
    torch.cuda.empty_cache()
    workers = [Worker(provider, arguments.limit_s) for provider in arguments.providers.split(",")]
    for worker in workers:
        worker.ask("")
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for case in arguments.cases.split(";"):
        found = measure_case(case, workers, arguments.rounds, notes)
        rows += [*found, *bandwidth_rows(found, first["copy_tb_s"])]
        last = calibrate()
        torch.cuda.empty_cache()
        if arguments.out:
            write(arguments, {"first": first, "last": last} | first, rows, notes)
    for worker in workers:
        worker.close()
    print(*notes, f"calibration {first} to {last}, {time.monotonic() - start:.0f} s", sep="\n", flush=True)


def measure_case(case: str, workers: Sequence[Worker], num_rounds: int, notes: list[str]) -> list[dict[str, Any]]:
    times: dict[str, dict[str, list[float]]] = {worker.provider: {} for worker in workers}
    rows = []
    failed = set()
    for _ in range(num_rounds):
        for worker in workers:
            if worker.provider in failed:
                continue
            answer = worker.ask(case)
            if answer is None or "error" in answer:
                failed.add(worker.provider)
                notes.append(f"{worker.provider}, {case}: {worker.note if answer is None else answer['error']}")
                continue
            rows += [_row(case, worker.provider, k, v, unit) for k, (v, unit) in answer["values"].items()]
            for name, value in answer["times"].items():
                times[worker.provider].setdefault(name, []).append(value)
    for provider, found in times.items():
        rows += [_row(case, provider, name, statistics.median(values), "ms") for name, values in found.items()]
    for row in rows:
        print(f"{row['impl']:18} {row['case']:44} {row['metric']:26} {row['value']:10.4g} {row['unit']}", flush=True)
    return rows


def bandwidth_rows(rows: Sequence[dict[str, Any]], copy_tb_s: float) -> list[dict[str, Any]]:
    """Bytes that a call must move, over its time, as a share of the copy's rate."""
    num_bytes = {(r["impl"], r["metric"].removesuffix("/bytes")): r["value"] for r in rows if r["unit"] == "B"}
    shares = [
        _row(r["case"], r["impl"], f"{r['metric']}/copy_frac", num / r["value"] / 1e9 / copy_tb_s, "fraction")
        for r in rows
        if (num := num_bytes.get((r["impl"], r["metric"])))
    ]
    for row in shares:
        print(f"{row['impl']:18} {row['case']:44} {row['metric']:26} {row['value']:10.3f}", flush=True)
    return shares


def _row(case: str, provider: str, metric: str, value: float, unit: str) -> dict[str, Any]:
    return {"case": case, "impl": provider, "metric": metric, "value": value, "unit": unit}


def write(arguments: argparse.Namespace, calibration: dict, rows: list[dict], notes: list[str]) -> None:
    result = {
        "command": f"python kernels/benchmarks/{Path(sys.argv[0]).name} --rounds {arguments.rounds}",
        "device": torch.cuda.get_device_name(), "versions": _versions(), "commit": arguments.commit,
        "calibration": calibration, "notes": notes, "rows": rows,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
