"""The longest completion of one GRPO step that fits on one GPU, by memory measured at shorter ones.

    python scripts/bench_context.py [--lengths 16384,32768,65536] [--gib 24,80] [--impls ..] --output FILE.json

One prompt of 200 tokens with one completion, Llama-3.1-8B shape in NF4, as `bench_step.py --memory` runs it: the base
is there, an engine's keys and values are given back. From 16,384 tokens on peak memory is a line in the length;
the one through the two longest that ran gives the longest that fits beside 1 GiB for the CUDA context. How far the
third point lies off that line is a row too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_step
from bench_workers import write_result

SHAPE = "llama-3.1-8b:nf4"
CONTEXT_GIB = 1.0


def longest_rows(impl: str, peaks: dict[int, float], limits_gib: list[float]) -> list[dict[str, Any]]:
    """From peaks in MiB by length; nothing from fewer than two."""
    if len(peaks) < 2:
        return []
    *shorter, before, last = sorted(peaks)
    slope = (peaks[last] - peaks[before]) / (last - before)
    case = SHAPE.replace(":", ", ")
    rows: list[dict[str, Any]] = [
        {"case": case, "impl": impl, "metric": "peak a token more", "value": 1024 * slope, "unit": "KiB"}
    ]
    for length in shorter:
        off = (peaks[last] - slope * (last - length)) / peaks[length] - 1
        rows.append(
            {"case": case, "impl": impl, "metric": f"line / peak at {length} - 1", "value": off, "unit": "share"}
        )
    for gib in limits_gib:
        longest = int(last + (1024 * (gib - CONTEXT_GIB) - peaks[last]) / slope)
        rows.append(
            {"case": case, "impl": impl, "metric": f"longest completion in {gib:g} GiB, by the line", "value": longest,
             "unit": "tokens"}
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="16384,32768,65536")
    parser.add_argument("--gib", default="24,80")
    parser.add_argument("--impls", default="rlbench:full+offload@1,unsloth:unsloth,trl:on")
    parser.add_argument("--timeout-s", type=float, default=150, help="of one length of one implementation")
    parser.add_argument("--commit", default="")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    subprocess.run([sys.executable, bench_step.__file__, "--make", SHAPE], check=True)
    command = f"python scripts/bench_context.py --lengths {arguments.lengths} --impls {arguments.impls}"
    rows: list[dict[str, Any]] = []
    for impl in arguments.impls.split(","):
        peaks: dict[int, float] = {}
        lines: list[dict[str, Any]] = []
        for length in map(int, arguments.lengths.split(",")):
            found = bench_step.run_case(f"one@{length}:{SHAPE}", impl, arguments.timeout_s, "--memory")
            rows += found
            for row in found:
                if row.get("metric") == "peak":
                    peaks[length] = row["value"]
            lines = longest_rows(impl, peaks, [float(gib) for gib in arguments.gib.split(",")])
            write_result(arguments.output, rows + lines, command, arguments.commit)  # the next length may be cut off
        rows += lines


if __name__ == "__main__":
    main()
