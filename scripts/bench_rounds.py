"""Side-by-side timing: every implementation in a process of its own, rounds interleaved, medians, one JSON file."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

_READY = "ready"


def serve(run: Callable[[], dict[str, float]]) -> None:
    """Worker side: warm up once, then run once for each line on stdin and answer with a JSON line."""
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the answers
    run()
    _give_memory_back()
    print(_READY, file=out, flush=True)
    for _ in sys.stdin:
        answer = json.dumps(run())
        _give_memory_back()
        print(answer, file=out, flush=True)


def _give_memory_back() -> None:
    """Waiting workers must not fill the memory that the running one needs. Outside of every timing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


class Worker:
    """Parent side of one implementation."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        self.name = name
        self.rounds: list[dict[str, float]] = []
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, sys.argv[0], "--worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.is_ready = self._readline() == _READY

    @property
    def last_error(self) -> str:
        """The last line that the process wrote to stderr."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "nothing on stderr")

    def run_round(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
            self.rounds.append(json.loads(self._readline()))
        except (BrokenPipeError, json.JSONDecodeError):
            code = self._process.wait(timeout=60)
            sys.exit(f"{self.name} ended with exit code {code}: {self.last_error}")

    def median(self, metric: str) -> float:
        return median(r[metric] for r in self.rounds)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _readline(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def run_interleaved(workers: Sequence[Worker], num_rounds: int) -> None:
    """A B C, A B C, ...: a change of the machine's speed hits all alike."""
    for number in range(num_rounds):
        for worker in workers:
            start = time.perf_counter()
            worker.run_round()
            print(
                f"round {number + 1}: {worker.name}: {worker.rounds[-1]} ({time.perf_counter() - start:.1f} s)",
                flush=True,
            )


def write_result(path: Path, rows: Sequence[dict[str, Any]], packages: Sequence[str]) -> None:
    """Write `{command, device, versions, commit, calibration, rows}`."""
    result = {
        "command": " ".join(["python", *sys.argv]),
        "device": _device(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "commit": _commit(),
        "calibration": {"matmul_gflops": _matmul_gflops()},
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


def _device() -> str:
    import os

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{cores} cores of {model}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _matmul_gflops() -> dict[str, float]:
    from rlbench.models.device import hardware_facts

    return {name: round(rate, 1) for name, rate in hardware_facts("cpu").matmul_gflops.items()}
