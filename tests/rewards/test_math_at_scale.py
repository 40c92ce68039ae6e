"""Ten thousand answers in a minute, and no 64 KiB of text past its deadline."""

import os
import random
import time

import pytest

from rlbench_rewards import RewardPool, RewardSample
from tests.rewards.math_texts import long_texts, paraphrased

MATH = {"name": "math", "path": "rlbench_rewards.math_answer.MathAnswer", "kwargs": {"extract": ["hash", "boxed"]}}


def test_ten_thousand_paraphrased_golds_are_right_and_their_neighbours_wrong_in_a_minute():
    cases = paraphrased(os.environ.get("RLBENCH_GSM8K"), random.Random(1))
    with RewardPool([{**MATH, "batch_size": 16}], num_workers=2, timeout_s=10) as pool:
        start = time.monotonic()
        results = pool.score([sample for sample, _ in cases])
        seconds = time.monotonic() - start

    wrong = [
        (sample.completion, sample.columns["answer"], result["math"])
        for (sample, value), result in zip(cases, results, strict=True)
        if result["math"].value != value
    ]
    assert len(cases) == 10_000 and not wrong, wrong[:5]
    assert seconds < 60


@pytest.mark.parametrize("policy", ["hash", "boxed", "answer_tag", "final_answer", "latex", "last_number"])
def test_no_long_text_passes_its_deadline_or_costs_a_worker(policy):
    timeout_s = 3.0
    spec = {**MATH, "kwargs": {"extract": [policy]}}
    texts = long_texts(random.Random(2))
    samples = [
        RewardSample(prompt="", completion=t, columns={"answer": gold}) for t in texts for gold in ("42", "x^2+1")
    ]
    with RewardPool([spec], num_workers=1, timeout_s=timeout_s) as pool:
        results = pool.score(samples)
        stats = pool.stats.take()

    assert [result["math"].status for result in results] == ["value"] * len(samples)
    assert max(result["math"].latency_s for result in results) < timeout_s + 1
    assert stats["reward_pool/num_restarts"] == 0


def test_an_answer_that_outlasts_its_deadline_is_a_timeout_and_the_worker_comes_back():
    spec = {"name": "misbehave", "path": "tests.rewards.bad_rewards.misbehave", "kwargs": {}}
    with RewardPool([spec], num_workers=1, timeout_s=0.5, allowed_prefixes=["tests.rewards.bad_rewards."]) as pool:
        start = time.monotonic()
        (result,) = pool.score([RewardSample(prompt="", completion="hold the interpreter lock")])
        assert result["misbehave"].status == "timeout" and result["misbehave"].value is None
        assert time.monotonic() - start < 3  # the call would last for 30 s and more
        assert pool.score([RewardSample(prompt="", completion="fine")])[0]["misbehave"].value == 0.5
