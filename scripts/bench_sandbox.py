"""Latency and throughput of the code sandbox, per backend, beside a plain Python process without any isolation.

    python scripts/bench_sandbox.py --output scripts/results/sandbox_cpu.json

A function task is a program, right or wrong, graded against three assertions: two confined processes. A program task
is one run of a program on one input: one confined process. Every verdict is checked. "warm" leaves the first tasks
out; "cold" starts everything anew for each task: zygote, both processes, verdict. "cpu" is the processor time of a warm
task, ours and that of all its processes, which other work on the machine changes less than the others. Throughput goes
through RewardPool, as in training. Backends are measured in interleaved rounds; medians over rounds. "load average" is
the machine's before the first round: above 0.5 something else was running.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_rounds import write_result

from rlbench_rewards import RewardPool, RewardSample
from rlbench_rewards.code_tests import CodeTests
from rlbench_rewards.sandbox.backends import ISOLATED
from rlbench_rewards.sandbox.probes import probe_backend

_PLAIN = "python process, no isolation"
_FUNCTIONS = {
    "def has_close(xs, t):\n    xs = sorted(xs)\n    return any(b - a < t for a, b in zip(xs, xs[1:]))": [
        "assert has_close([1.0, 2.0, 3.9, 4.0], 0.3)",
        "assert not has_close([1.0, 2.0], 0.05)",
        "assert has_close([1.0, 1.0], 0.1)",
    ],
    "def primes(n):\n    return [p for p in range(2, n) if all(p % d for d in range(2, int(p**0.5) + 1))]": [
        "assert primes(10) == [2, 3, 5, 7]",
        "assert primes(2) == []",
        "assert len(primes(1000)) == 168",
    ],
    "from collections import Counter\ndef most_common(words):\n    return Counter(words).most_common(1)[0]": [
        "assert most_common(['a', 'b', 'a']) == ('a', 2)",
        "assert most_common(['x']) == ('x', 1)",
        "assert most_common(list('hello')) == ('l', 2)",
    ],
    "import re\ndef words(text):\n    return re.findall(r'[a-z]+', text.lower())": [
        "assert words('Hello, World') == ['hello', 'world']",
        "assert words('') == []",
        "assert words('a1b') == ['a', 'b']",
    ],
}
_PROGRAM = "n = int(input())\nprint(sum(map(int, input().split())))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=200, help="warm tasks a round")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    reports = {kind: probe_backend(kind) for kind in ISOLATED}
    kinds = [kind for kind, report in reports.items() if report.is_good]
    if not kinds:
        sys.exit("no backend isolates here: python -m rlbench sandbox doctor")
    rounds: dict[tuple[str, str, str, str], list[float]] = {}
    for number in range(options.rounds):
        for kind in kinds:
            for case, metric, value, unit in _measured(kind, options.tasks, options.workers):
                rounds.setdefault((case, kind, metric, unit), []).append(value)
        for case, metric, value, unit in _measured_plain(options.tasks // 4):
            rounds.setdefault((case, _PLAIN, metric, unit), []).append(value)
        print(f"round {number + 1} done", flush=True)
    rows = [
        {"case": case, "impl": impl, "metric": metric, "value": round(statistics.median(values), 2), "unit": unit}
        for (case, impl, metric, unit), values in rounds.items()
    ]
    rows += [
        {"case": "all probes", "impl": kind, "metric": "time", "value": round(reports[kind].seconds, 2), "unit": "s"}
        for kind in kinds
    ]
    rows.append({"case": "before", "impl": "machine", "metric": "load average", "value": round(load, 2), "unit": ""})
    for row in rows:
        print(f"{row['case']:28} {row['impl']:30} {row['metric']:12} {row['value']:>9} {row['unit']}")
    if options.output:
        write_result(options.output, rows, [])


def _function_samples(count: int) -> list[tuple[RewardSample, float]]:
    """Right programs and, each third, one that returns nothing."""
    samples = []
    for index in range(count):
        program, tests = list(_FUNCTIONS.items())[index % len(_FUNCTIONS)]
        is_right = index % 3 != 2
        code = program if is_right else program.replace("return", "return None and")
        sample = RewardSample(prompt="", completion=f"```python\n{code}\n```", columns={"test_list": tests})
        samples.append((sample, float(is_right)))
    return samples


def _program_samples(count: int) -> list[tuple[RewardSample, float]]:
    row = {"tests": [{"input": "3\n1 2 3\n", "output": "6\n"}]}
    return [(RewardSample(prompt="", completion=f"```python\n{_PROGRAM}\n```", columns=row), 1.0)] * count


def _measured(kind: str, num_tasks: int, num_workers: int) -> list[tuple[str, str, float, str]]:
    results = []
    for case, samples in (
        ("function task", _function_samples(num_tasks)),
        ("program task", _program_samples(num_tasks)),
    ):
        latencies, cpu_ms = _warm_latencies(kind, samples)
        results += [*_latency_rows(f"{case}, warm", latencies), (f"{case}, warm", "cpu", cpu_ms, "ms")]
        rate = _tasks_per_s(kind, samples, num_workers)
        results.append((f"{case}, warm, {num_workers} workers", "throughput", rate, "tasks/s"))
        results += _latency_rows(f"{case}, cold", _cold_latencies(kind, samples[:10]))
    return results


def _latency_rows(case: str, latencies_ms: Sequence[float]) -> list[tuple[str, str, float, str]]:
    ordered = sorted(latencies_ms)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return [(case, "p50", statistics.median(ordered), "ms"), (case, "p95", p95, "ms")]


def _warm_latencies(kind: str, samples: Sequence[tuple[RewardSample, float]]) -> tuple[list[float], float]:
    """Milliseconds of each task, and of processor time a task."""
    reward = CodeTests(backend=kind)
    _graded(reward, samples[:10])
    time.sleep(0.5)  # the zygote imports in idle moments
    _graded(reward, samples[:10])
    process = reward._sandbox._zygote._process  # type: ignore[union-attr]
    before_s = time.process_time() + _cpu_s_of_group(process.pid)
    latencies = [_graded(reward, [sample]) for sample in samples]
    cpu_s = time.process_time() + _cpu_s_of_group(process.pid) - before_s
    reward.close()
    return latencies, cpu_s / len(samples) * 1000


def _cpu_s_of_group(group: int) -> float:
    """Of a zygote, which leads the group, and of all its jobs that have ended."""
    ticks = 0
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            ticks += sum(map(int, fields[11:15]))  # user and system, its own and of its children
    return ticks / os.sysconf("SC_CLK_TCK")


def _cold_latencies(kind: str, samples: Sequence[tuple[RewardSample, float]]) -> list[float]:
    latencies = []
    for sample in samples:
        reward = CodeTests(backend=kind)  # the zygote starts with the first task
        latencies.append(_graded(reward, [sample]))
        reward.close()
    return latencies


def _graded(reward: CodeTests, samples: Sequence[tuple[RewardSample, float]]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    for sample, value in samples:
        output = reward(sample)
        assert output.value == value, (sample, output)
    return (time.perf_counter() - start) * 1000


def _tasks_per_s(kind: str, samples: Sequence[tuple[RewardSample, float]], num_workers: int) -> float:
    specs = [{"name": "code", "path": "rlbench_rewards.code_tests.CodeTests", "kwargs": {"backend": kind}}]
    with RewardPool(specs, num_workers=num_workers, timeout_s=30) as pool:
        pool.score([sample for sample, _ in samples[:20]])
        time.sleep(0.5)
        pool.score([sample for sample, _ in samples[:20]])
        start = time.perf_counter()
        outcomes = pool.score([sample for sample, _ in samples])
        elapsed_s = time.perf_counter() - start
    assert [outcome["code"].value for outcome in outcomes] == [value for _, value in samples]
    return len(samples) / elapsed_s


def _measured_plain(num_tasks: int) -> list[tuple[str, str, float, str]]:
    """What a harness without isolation pays: a new interpreter that runs the program with its tests behind it."""
    latencies = []
    for sample, value in _function_samples(num_tasks):
        tests: Any = sample.columns["test_list"]
        code = sample.completion.removeprefix("```python\n").removesuffix("```") + "\n".join(tests)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True)
        latencies.append((time.perf_counter() - start) * 1000)
        assert (done.returncode == 0) == (value == 1.0)
    return _latency_rows("function task, cold", latencies)


if __name__ == "__main__":
    main()
