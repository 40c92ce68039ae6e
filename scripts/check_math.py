"""What the math reward is promised to do, counted: paraphrases in time, no long text past its deadline, no false pass.

    python scripts/check_math.py --gsm8k FOLDER --output scripts/results/math_cpu.json

FOLDER holds GSM8K's train.jsonl and test.jsonl; without it, answers are written like GSM8K's. 10,000 gold answers as a
model may write them, every fourth off by one, go through a pool of 2 workers; every text of 64 KiB goes through each
policy of extraction; Math-Verify and the reward judge the pairs of tests/rewards/math_cases.py, which we wrote.
Exit status 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_rounds import write_result

from rlbench_rewards import RewardPool, RewardSample
from rlbench_rewards.math_answer import answers_equal
from tests.rewards.math_cases import DIFFERENT, EQUAL
from tests.rewards.math_texts import long_texts, paraphrased
from tests.rewards.test_math_equality import math_verify_says

DEADLINE_S = 3.0
POLICIES = ("hash", "boxed", "answer_tag", "final_answer", "latex", "last_number")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.gsm8k is not None and not list(options.gsm8k.glob("*.jsonl")):
        sys.exit(f"--gsm8k is {options.gsm8k}, which holds no .jsonl file")
    load = {"case": "machine", "impl": "-", "metric": "load average before", "value": os.getloadavg()[0], "unit": "-"}
    paraphrases, texts, pairs = _paraphrases(options.gsm8k), _long_texts(), _pairs()
    rows = [row for found in (paraphrases, texts, pairs) for row in _rows(*found)]
    print(json.dumps(rows, indent=1))
    if options.output is not None:
        write_result(options.output, [load, *rows], ["math-verify", "sympy"])
    is_kept = (
        not paraphrases[1]["wrong verdicts"] and paraphrases[1]["seconds"] < 60
        and texts[1]["longest, s"] < DEADLINE_S + 0.2 and not texts[1]["no verdict"] and not texts[1]["workers lost"]
        and not pairs[1]["false positives"] and not pairs[1]["misses"]
    )  # fmt: skip
    return int(not is_kept)


def _paraphrases(folder: Path | None) -> tuple[str, dict[str, float]]:
    cases = paraphrased(str(folder) if folder else None, random.Random(1))
    spec = {"name": "math", "path": "rlbench_rewards.math_answer.MathAnswer", "batch_size": 16}
    with RewardPool([{**spec, "kwargs": {"extract": ["hash", "boxed"]}}], num_workers=2, timeout_s=10) as pool:
        start = time.monotonic()
        results = pool.score([sample for sample, _ in cases])
        seconds = time.monotonic() - start
    wrong = sum(result["math"].value != value for (_, value), result in zip(cases, results, strict=True))
    name = f"{len(cases)} answers to GSM8K{'' if folder else '-like problems'}, 2 workers"
    return name, {"seconds": round(seconds, 2), "wrong verdicts": wrong}


def _long_texts() -> tuple[str, dict[str, float]]:
    texts, golds = long_texts(random.Random(2)), ("42", "x^2+1")
    samples = [RewardSample(prompt="", completion=text, columns={"answer": gold}) for text in texts for gold in golds]
    outcomes, num_restarts = [], 0.0
    for policy in POLICIES:
        spec = {"name": "math", "path": "rlbench_rewards.math_answer.MathAnswer", "kwargs": {"extract": [policy]}}
        with RewardPool([spec], num_workers=1, timeout_s=DEADLINE_S) as pool:
            outcomes += [result["math"] for result in pool.score(samples)]
            num_restarts += pool.stats.take()["reward_pool/num_restarts"]
    name = (
        f"{len(texts)} texts of 64 KiB, {len(golds)} gold answers, {len(POLICIES)} policies, deadline {DEADLINE_S:g} s"
    )
    return name, {
        "longest, s": round(max(outcome.latency_s for outcome in outcomes), 3),
        "no verdict": sum(outcome.status != "value" for outcome in outcomes),
        "workers lost": num_restarts,
    }


def _pairs() -> tuple[str, dict[str, float]]:
    return f"{len(DIFFERENT)} different and {len(EQUAL)} equal pairs", {
        "false positives": sum(answers_equal(answer, gold)[0] for gold, answer in DIFFERENT),
        "misses": sum(not answers_equal(answer, gold)[0] for gold, answer in EQUAL),
        "false positives of Math-Verify": sum(math_verify_says(gold, answer) for gold, answer in DIFFERENT),
        "misses of Math-Verify": sum(not math_verify_says(gold, answer) for gold, answer in EQUAL),
    }


def _rows(case: str, found: dict[str, float]) -> list[dict[str, Any]]:
    units = {"seconds": "s", "longest, s": "s", "wrong verdicts": "answers", "no verdict": "texts", "workers lost": "-"}
    return [
        {
            "case": case,
            "impl": "math-verify" if metric.endswith("Math-Verify") else "rlbench",
            "metric": metric.removesuffix(", s").removesuffix(" of Math-Verify"),
            "value": value,
            "unit": units.get(metric, "pairs"),
        }
        for metric, value in found.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
