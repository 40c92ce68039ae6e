"""Ten thousand answers in a minute, and no 64 KiB of text past its deadline."""

import json
import os
import random
import time
from pathlib import Path

import pytest

from rlbench_rewards import RewardPool, RewardSample

MATH = {"name": "math", "path": "rlbench_rewards.math_answer.MathAnswer", "kwargs": {"extract": ["hash", "boxed"]}}
NUM_ANSWERS = 10_000
KIB_64 = 65_536


def gsm8k_style_golds(rng: random.Random) -> list[str]:
    """Gold solutions; from GSM8K's own rows if RLBENCH_GSM8K names a folder with them, else written like them."""
    folder = os.environ.get("RLBENCH_GSM8K")
    if folder:
        lines = [line for file in sorted(Path(folder).glob("*.jsonl")) for line in file.read_text().splitlines()]
        answers = [json.loads(line)["answer"] for line in lines]
        return [answers[index % len(answers)] for index in range(NUM_ANSWERS)]
    numbers = [
        rng.choice((rng.randint(0, 99), rng.randint(100, 10**6), -rng.randint(1, 50))) for _ in range(NUM_ANSWERS)
    ]
    return [f"It is {n - 1}+1=<<{n - 1}+1={n}>>{n}.\n#### {n:,}" for n in numbers]


def paraphrase(number: str, rng: random.Random) -> str:
    """The number as a model may write it."""
    plain = number.replace(",", "")
    forms = [
        f"So the result is {plain}.\n#### {plain}", f"#### {number}", f"#### ${number}", f"\n\n####   {plain}.0\n",
        f"\\boxed{{{plain}}}", f"Therefore $x = \\boxed{{{number.replace(',', '{,}')}}}$.", f"\\boxed{{{plain}.00}}",
        f"\\boxed{{x = {plain}}}", f"\\boxed{{{plain}\\text{{ kg}}}}", f"\\boxed{{\\frac{{{2 * int(plain)}}}{{2}}}}",
        f"\\boxed{{{int(plain) - 1} + 1}}", f"#### {plain} apples", f"<think>#### 7</think>#### {plain}",
    ]  # fmt: skip
    return rng.choice(forms)


def test_ten_thousand_paraphrased_golds_are_right_and_their_neighbours_wrong_in_a_minute():
    rng = random.Random(1)
    golds = gsm8k_style_golds(rng)
    samples = []
    for index, gold in enumerate(golds):
        number = gold.rsplit("####", 1)[1].strip()
        stated = number if index % 4 else f"{int(number.replace(',', '')) + 1:,}"
        samples.append(RewardSample(prompt="", completion=paraphrase(stated, rng), columns={"answer": gold}))
    with RewardPool([{**MATH, "batch_size": 16}], num_workers=2, timeout_s=10) as pool:
        start = time.monotonic()
        results = pool.score(samples)
        seconds = time.monotonic() - start

    wrong = [
        (sample.completion, sample.columns["answer"], result["math"])
        for index, (sample, result) in enumerate(zip(samples, results, strict=True))
        if result["math"].value != float(index % 4 != 0)
    ]
    print(f"{len(samples)} answers in {seconds:.1f} s")
    assert not wrong, wrong[:5]
    assert seconds < 60


def long_of(piece: str) -> str:
    return piece * (KIB_64 // len(piece))


LONG = [
    *map(
        long_of,
        ["1", "-", "$", "\n", " ", "\0", "1,", "1.", "1/", "1%", "#### ", "<answer>", "answer is ", "\\[", "<think>"],
    ),
    *map(long_of, ["\\boxed{", "\\boxed{1}", "one ", "{", "\\frac{", "answer: is "]),
    long_of("1,") + "x",
    long_of("\n") + "#### 1,",
    "#### " + long_of("(1+"),
    "\\boxed{" + long_of("\\"),
    "\\boxed{" + long_of("x+") + "1}",
    "".join(f"\\boxed{{{i}}}" for i in range(5000)),
]


@pytest.mark.parametrize("policy", ["hash", "boxed", "answer_tag", "final_answer", "latex", "last_number"])
def test_no_long_text_passes_its_deadline_or_costs_a_worker(policy):
    timeout_s = 3.0
    spec = {**MATH, "kwargs": {"extract": [policy]}}
    rng = random.Random(2)
    noise = ["".join(rng.choices("\\{}()[]0123456789^$#,.-+ \nxanswer", k=KIB_64)) for _ in range(5)]
    texts = [*LONG, *noise]
    with RewardPool([spec], num_workers=1, timeout_s=timeout_s) as pool:
        results = pool.score([RewardSample(prompt="", completion=t, columns={"answer": "42"}) for t in texts])
        stats = pool.stats.take()

    assert [result["math"].status for result in results] == ["value"] * len(texts)
    assert max(result["math"].latency_s for result in results) < timeout_s + 0.2
    assert stats["reward_pool/num_restarts"] == 0


def test_an_answer_that_outlasts_its_deadline_is_a_timeout_and_the_worker_comes_back():
    spec = {"name": "misbehave", "path": "tests.rewards.bad_rewards.misbehave", "kwargs": {}}
    with RewardPool([spec], num_workers=1, timeout_s=0.5, allowed_prefixes=["tests.rewards.bad_rewards."]) as pool:
        start = time.monotonic()
        (result,) = pool.score([RewardSample(prompt="", completion="hold the interpreter lock")])
        assert result["misbehave"].status == "timeout" and result["misbehave"].value is None
        assert time.monotonic() - start < 0.5 + 0.2 + 0.3  # and the thread's own scheduling
        assert pool.score([RewardSample(prompt="", completion="fine")])[0]["misbehave"].value == 0.5
