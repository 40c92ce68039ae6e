"""Run Math-Verify's own test cases through our math reward and list every verdict that differs, with the reason.

    pip download --no-binary :all: --no-deps math-verify==0.9.0 && tar xzf math_verify-0.9.0.tar.gz
    python scripts/check_math_verify_suite.py math_verify-0.9.0 --output scripts/results/math_verify_suite.json

The cases stay where they are; this file holds only their places and why we disagree.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path

from bench_rounds import write_result

from rlbench_rewards import RewardSample
from rlbench_rewards.extraction import extract_answer, math_spans
from rlbench_rewards.math_answer import MathAnswer

MODULES = ("all", "boxed", "numina_cases", "open_thoughts", "strict", "yujianll")
POLICIES = ("boxed", "final_answer", "latex", "last_number")
CONTRADICTION = "the chain states two different numbers; theirs takes the last"
EXTRACTION = "our policies do not look there: prose with several numbers and no statement of an answer"
REASONS = {
    ("test_number_extraction", 2): "last_number does not join `1 000` in prose; as an answer it equals 1000",
    ("test_simple_fraction_notation", 0): "LaTeX without delimiters in prose; as an answer it is equal",
    ("test_simple_fraction_notation", 1): "LaTeX without delimiters in prose; as an answer it is equal",
    ("test_latex_notation", 5): "`$` over several lines is read; a policy of extraction, the value is the same",
    ("test_latex_notation", 6): "`\\(` over several lines is read; a policy of extraction, the value is the same",
    ("test_latex_notation", 9): CONTRADICTION,
    ("test_relations_math", 10): CONTRADICTION,
    ("test_relations_math", 12): CONTRADICTION,
    ("test_relations_math", 13): CONTRADICTION,
    ("test_relations_math", 21): CONTRADICTION,
    ("test_relations_math", 26): CONTRADICTION,
    ("test_relations_math", 27): CONTRADICTION,
    ("test_math_extraction_edge_cases", 1): EXTRACTION,
    ("test_math_extraction_additional_cases", 1): EXTRACTION,
    ("test_math_extraction_additional_cases", 8): EXTRACTION,
    ("test_math_extraction_additional_cases", 17): "several different boxed answers are not a pass",
    ("test_open_thoughts", 28): "two boxes in the gold answer are a list of two",
    ("test_strict_variable_comparison", 0): "their strict=False: other names of variables; we have no such mode",
    ("test_string_extraction", 9): "1 - 1/e and 1 + 1/e are different numbers",
}


def cases(folder: Path) -> Iterator[tuple[str, int, tuple]]:
    """(test name, index, (gold, answer, expected, ...)) of every parametrised case, each once."""
    package = types.ModuleType("tests")
    package.__path__ = [str(folder / "tests")]
    sys.modules["tests"] = package
    seen = set()
    for module in MODULES:
        for name, test in vars(importlib.import_module(f"tests.test_{module}")).items():
            for mark in getattr(test, "pytestmark", ()) if name.startswith("test_") else ():
                for index, case in enumerate(mark.args[1] if mark.name == "parametrize" else ()):
                    if (name, index, str(case)) not in seen:
                        seen.add((name, index, str(case)))
                        yield name, index, case


def gold_answer(text: str) -> str:
    found = extract_answer(text, ("boxed", "latex", "final_answer", "last_number"))
    spans = math_spans(text)
    if len(set(found.boxes)) > 1:
        return ", ".join(dict.fromkeys(found.boxes))
    if found.reason == "latex" and len(spans) > 1 and len(text) < 60:
        return ", ".join(spans)
    return found.answer or text


def reward_for(name: str, case: tuple) -> MathAnswer:
    """The options that the test sets."""
    if name == "test_number_extraction":
        return MathAnswer(extract=POLICIES, decimal_comma=True)
    if name == "test_set_rel_assymetry":
        return MathAnswer(extract=POLICIES, relations_as_sets=case[3])
    if name == "test_complex_math_expressions":
        return MathAnswer(extract=POLICIES, min_rounded_digits=case[3])
    return MathAnswer(extract=POLICIES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    counts = {"cases": 0, "the same verdict": 0, "another verdict, with a reason": 0, "another verdict": 0}
    for name, index, case in cases(options.folder):
        gold, answer, expected = case[:3]
        counts["cases"] += 1
        sample = RewardSample(prompt="", completion=answer, columns={"answer": gold_answer(gold)})
        output = reward_for(name, case)(sample)
        if output.value == expected:
            counts["the same verdict"] += 1
            continue
        reason = REASONS.get((name, index))
        counts["another verdict, with a reason" if reason else "another verdict"] += 1
        print(f"{name}[{index}]: theirs {int(expected)}, ours {output.value:g}: {reason or 'NOT EXPLAINED'}")
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))
    if options.output is not None:
        rows = [{"case": options.folder.name, "impl": "rlbench", "metric": name, "value": count, "unit": "cases"}
                for name, count in counts.items()]  # fmt: skip
        write_result(options.output, rows, ["math-verify", "sympy"])
    return int(counts["another verdict"] > 0)


if __name__ == "__main__":
    sys.exit(main())
