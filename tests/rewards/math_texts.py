"""Many answers as a model may write them, and texts of 64 KiB, for the math reward."""

from __future__ import annotations

import json
import random
from pathlib import Path

from rlbench_rewards import RewardSample
from tests.rewards.math_cases import BOMBS

NUM_ANSWERS = 10_000
KIB_64 = 65_536


def paraphrased(folder: str | None, rng: random.Random) -> list[tuple[RewardSample, float]]:
    """Gold answers in other words, and the value of each: of every fourth the number is one more, which is 0.0.

    Args:
        folder: with GSM8K's own rows, *.jsonl; None: solutions written like them.
    """
    cases = []
    for index, gold in enumerate(_golds(folder, rng)):
        number = gold.rsplit("####", 1)[1].strip()
        stated = number if index % 4 else f"{int(number.replace(',', '')) + 1:,}"
        sample = RewardSample(prompt="", completion=_paraphrase(stated, rng), columns={"answer": gold})
        cases.append((sample, float(index % 4 != 0)))
    return cases


def _golds(folder: str | None, rng: random.Random) -> list[str]:
    if folder:
        lines = [line for file in sorted(Path(folder).glob("*.jsonl")) for line in file.read_text().splitlines()]
        answers = [json.loads(line)["answer"] for line in lines]
        return [answers[index % len(answers)] for index in range(NUM_ANSWERS)]
    numbers = [
        rng.choice((rng.randint(0, 99), rng.randint(100, 10**6), -rng.randint(1, 50))) for _ in range(NUM_ANSWERS)
    ]
    return [f"It is {n - 1}+1=<<{n - 1}+1={n}>>{n}.\n#### {n:,}" for n in numbers]


def _paraphrase(number: str, rng: random.Random) -> str:
    """The number as a model may write it."""
    plain = number.replace(",", "")
    forms = [
        f"So the result is {plain}.\n#### {plain}", f"#### {number}", f"#### ${number}", f"\n\n####   {plain}.0\n",
        f"\\boxed{{{plain}}}", f"Therefore $x = \\boxed{{{number.replace(',', '{,}')}}}$.", f"\\boxed{{{plain}.00}}",
        f"\\boxed{{x = {plain}}}", f"\\boxed{{{plain}\\text{{ kg}}}}", f"\\boxed{{\\frac{{{2 * int(plain)}}}{{2}}}}",
        f"\\boxed{{{int(plain) - 1} + 1}}", f"#### {plain} apples", f"<think>#### 7</think>#### {plain}",
    ]  # fmt: skip
    return rng.choice(forms)


def _long_of(piece: str) -> str:
    return piece * (KIB_64 // len(piece))


_LONG = [
    *map(
        _long_of,
        ["1", "-", "$", "\n", " ", "\0", "1,", "1.", "1/", "1%", "#### ", "<answer>", "answer is ", "\\[", "<think>"],
    ),
    *map(_long_of, ["\\boxed{", "\\boxed{1}", "one ", "{", "\\frac{", "answer: is "]),
    _long_of("1,") + "x",
    _long_of("\n") + "#### 1,",
    "#### " + _long_of("(1+"),
    "\\boxed{" + _long_of("\\"),
    "\\boxed{" + _long_of("x+") + "1}",
    "".join(f"\\boxed{{{i}}}" for i in range(5000)),
]


def long_texts(rng: random.Random) -> list[str]:
    """Texts of 64 KiB: one piece again and again, answers that would take for ever behind much text, and noise."""
    noise = ["".join(rng.choices("\\{}()[]0123456789^$#,.-+ \nxanswer", k=KIB_64)) for _ in range(5)]
    bombs = [f"{_long_of('So it is. ')}\n#### {bomb} <answer>{bomb}</answer> \\boxed{{{bomb}}}" for bomb in BOMBS]
    return [*_LONG, *noise, *bombs]
