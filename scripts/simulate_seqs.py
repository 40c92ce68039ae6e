"""How many sequences to decode together where the KV cache is small: a rollout of 256 completions by arithmetic.

    python scripts/simulate_seqs.py [--output scripts/results/simulate_seqs.json]

The 8B shape over NF4 without dense copies, 16 prompts of 200 tokens x 16 completions, `sampling.max_tokens=2048`, and a
KV cache of 8.8 GiB, which holds 35 completions of that length: 40% of hardware.memory_gib=22; or of the 10.7 GiB that
are left there while it generates. A step costs what was measured at 8, 64 and 256 sequences
(results/dense_copies_h200.json), lines in between; tokens that are computed as a prompt come at an assumed 8,000 a
second. As vLLM does, the sequence that began last is put off where no memory is left, and computed again when there is
some. `measured` is the generation of such a run (results/grpo_cap22_h200.json).
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

from bench_grpo import drawn_lengths

RESULTS = Path(__file__).parent / "results"
PROMPT, GROUP, LONGEST, COUNT = 200, 16, 2048, 256
TOKEN_BYTES, BLOCK = 2 * 32 * 1024 * 2, 16
CACHES = (8.8, 10.7)  # GiB
PREFILL_RATE = 8000.0  # tokens a second
SEQUENCES = (32, 64, 128, 256)


def lengths() -> dict[str, list[int]]:
    """Tokens of the completions, by what they are."""
    draw = random.Random(1)
    return {
        "mean 800, as bench_grpo.py": drawn_lengths(COUNT),
        "100 to 500": [draw.randint(100, 500) for _ in range(COUNT)],
        "half at the limit": [LONGEST if draw.random() < 0.5 else draw.randint(200, 1200) for _ in range(COUNT)],
        "all at the limit": [LONGEST] * COUNT,
    }


def step_s(measured: dict[int, float], num_running: int) -> float:
    """Seconds of a step, by lines through the measured ones."""
    sizes = sorted(measured)
    low = max([size for size in sizes[:-1] if size <= num_running], default=sizes[0])
    high = sizes[sizes.index(low) + 1]
    slope = (measured[high] - measured[low]) / (high - low)
    return 1e-3 * (measured[low] + slope * (num_running - low))


def simulate(wanted: list[int], num_seqs: int, kv_gib: float, measured: dict[int, float]) -> tuple[float, int]:
    """Seconds, and how often a sequence was put off."""
    capacity = int(kv_gib * 2**30 / TOKEN_BYTES)
    waiting, running = list(range(len(wanted))), []
    grown = [0] * len(wanted)
    seconds, num_put_off = 0.0, 0
    while waiting or running:
        groups = {index // GROUP for index in running}  # whose prompt is there
        used = PROMPT * len(groups) + sum(grown[index] for index in running)
        computed = 0
        while waiting and len(running) < num_seqs:
            needed = grown[waiting[0]] + (0 if waiting[0] // GROUP in groups else PROMPT)
            if used + needed + BLOCK > capacity:
                break
            running.append(waiting.pop(0))
            groups.add(running[-1] // GROUP)
            used, computed = used + needed, computed + needed
        while used + len(running) > capacity and len(running) > 1:
            waiting.insert(0, running.pop())
            used -= grown[waiting[0]]
            num_put_off += 1
        seconds += step_s(measured, len(running)) + computed / PREFILL_RATE
        for index in running:
            grown[index] += 1
        running = [index for index in running if grown[index] < wanted[index]]
    return seconds, num_put_off


def values(file: str, **wanted: str) -> list[dict[str, Any]]:
    rows = json.loads((RESULTS / file).read_text())["rows"]
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "simulate_seqs.json")
    options = parser.parse_args()
    copies = values("dense_copies_h200.json", case="llama-3.1-8b, nf4", impl="rlbench, dense_copies=none")
    measured = {
        int(row["metric"].split()[0]): row["value"] for row in copies if row.get("metric", "").endswith(" sequences")
    }
    (run,) = values("grpo_cap22_h200.json", impl="rlbench", metric="generation")
    rows = [{"case": "mean 800, as bench_grpo.py", "impl": "measured, 128 sequences, 10.7 GiB", "metric": "generation",
             "value": run["value"], "unit": "s"}]  # fmt: skip
    for case, wanted in lengths().items():
        for kv_gib, num_seqs in product(CACHES, SEQUENCES):
            seconds, num_put_off = simulate(wanted, num_seqs, kv_gib, measured)
            impl = f"{num_seqs} sequences" + (f", {kv_gib} GiB" if kv_gib != CACHES[0] else "")
            rows.append({"case": case, "impl": impl, "metric": "generation", "value": round(seconds, 1), "unit": "s"})
            rows.append({"case": case, "impl": impl, "metric": "put off", "value": num_put_off, "unit": "times"})
            print(f"{case}, {impl}: {seconds:.1f} s, {num_put_off} times put off", flush=True)
    result = {"command": "python scripts/simulate_seqs.py", "device": "arithmetic", "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
