"""The trial passes honest rewards and names the fault of each dishonest one."""

import pytest

from rlbench_rewards import RewardPool, RewardSample
from rlbench_rewards.loading import load_reward
from rlbench_rewards.trial import ADVERSARIAL, Report, as_plain, peak_memory_mib, try_reward

PREFIXES = ["tests.rewards.bad_rewards."]
ROWS = [
    RewardSample(prompt=f"What is {n} + 1?", completion="", prompt_id=f"train/{n}", columns={"answer": str(n + 1)})
    for n in range(1, 9)
]


def report_of(path: str, rows=ROWS, is_accuracy: bool = True, **kwargs) -> Report:
    spec = {"name": "x", "path": path, "kwargs": kwargs}
    with RewardPool([spec], num_workers=2, timeout_s=2, allowed_prefixes=PREFIXES) as pool:
        target = load_reward("x", path, kwargs, PREFIXES).target
        report = try_reward(pool, "x", target, rows, is_accuracy=is_accuracy)
        assert (peak_memory_mib(pool.pids()) or 10) > 5
    return report


def verdicts(report: Report) -> dict[str, str]:
    return {check.name: check.verdict for check in report.checks}


@pytest.mark.parametrize("extract", ["hash", "boxed", "answer_tag", "final_answer", "latex", "last_number"])
def test_the_math_reward_passes_with_every_policy(extract):
    report = report_of("rlbench_rewards.math_answer.MathAnswer", extract=[extract])

    assert set(verdicts(report).values()) == {"pass"}, report.checks
    assert report.agreement == 1.0 and report.has_passed
    assert 0 < (report.latency_s(50) or 0) <= (report.latency_s(99) or 0)


def test_a_reward_that_pays_for_everything_fails_on_shuffled_and_adversarial_answers():
    report = report_of("tests.rewards.bad_rewards.always_one")

    assert verdicts(report) == {
        "unit cases": "note", "adversarial completions": "fail", "gold answers": "pass", "shuffled answers": "fail",
    }  # fmt: skip
    assert report.agreement == 0.5


def test_a_reward_that_rejects_right_answers_lists_the_rows():
    rows = [*ROWS[:3], RewardSample(prompt="", completion="", prompt_id="train/99", columns={"answer": "see page 3"})]
    report = report_of("tests.rewards.bad_rewards.only_small_answers", rows)
    (gold,) = [check for check in report.checks if check.name == "gold answers"]

    assert gold.verdict == "fail" and gold.text.startswith("1 of 4 do not")
    assert gold.rows == ("train/99: gold see page 3 gives 0",)


def test_a_reward_that_breaks_or_hangs_fails():
    broken = report_of("tests.rewards.bad_rewards.breaks_on_empty", is_accuracy=False)
    (check,) = [check for check in broken.checks if check.name == "adversarial completions"]

    assert check.verdict == "fail" and check.rows == ("empty: error: IndexError: string index out of range",)
    assert check.text.endswith("do not: get a verdict")


def test_wrong_unit_cases_are_told():
    report = report_of("tests.rewards.bad_rewards.WrongUnitCases", is_accuracy=False)
    (check,) = [check for check in report.checks if check.name == "unit cases"]

    assert check.rows == ("ab: expected 3, got 2",)


def test_the_reports_become_json():
    plain = as_plain({"x": report_of("tests.rewards.bad_rewards.always_one")}, {"x": 12.5})

    assert plain["verdict"] == "fail" and plain["rewards"]["x"]["peak_memory_mib"] == 12.5
    assert len(ADVERSARIAL) >= 20 and plain["rewards"]["x"]["checks"][1]["verdict"] == "fail"
