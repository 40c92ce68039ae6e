"""Planned and actual: the numbers of the table."""

import json

import pytest

from rlbench.report.planned import deviation
from rlbench.report.run_report import write_run_report
from tests.report.conftest import write_run

PLAN = {
    "kind": "resident memory",
    "source": "measured <b>here</b>",
    "plan": {
        "memory_gib": {"activations": 3.0, "base weights": 1.0},
        "peak_gib": 4.0,
        "generation_peak_gib": 2.0,
        "update_peak_gib": 4.0,
        "time_s": {"generation": 10.0, "update": 1.0},
    },
}


@pytest.fixture
def make(tmp_path, read_page):
    def write(plan):
        run = write_run(
            tmp_path / "run",
            train=lambda step: {
                "memory/generation_gib": 3.0 * step,
                "memory/update_gib": 4.0 + 0.1 * step,
                "memory/peak_gib": 5.0,
                "time/update_s": 0.2 * step,
            },
        )
        if plan is not None:
            (run / "plan.json").write_text(plan if isinstance(plan, str) else json.dumps(plan))
        return read_page(write_run_report(run))

    return write


def test_the_deviation_is_that_of_the_highest_step(make):
    text = make(PLAN).text

    assert "memory, update4.00 GiB5.00 GiB+25.0%4.55 GiB" in text
    assert "memory, generation2.00 GiB3.00 GiB+50.0%3.00 GiB" in text  # of the first step, before an update
    assert "time, update1.0s2.0s+100.0%1.1s" in text
    assert "activations3.0075%" in text and "kept for later" in text
    assert "measured <b>here</b>" in text


@pytest.mark.parametrize("paged", [{"paged_gib": 1.5}, {"paged_gib": 0.0}, {}])  # {}: an older plan
def test_paged_moments_are_named_beside_the_planned_peak(make, paged):
    text = make(PLAN | {"plan": PLAN["plan"] | paged}).text

    assert "planned peak of 4.00 GiB by part" in text
    words = "Beside it 1.50 GiB of optimizer state, paged: the driver moves it to host memory"
    assert (words in text) == ("of optimizer state" in text) == bool(paged.get("paged_gib"))


def test_a_formula_plans_no_times(make):
    text = make(PLAN | {"kind": "device memory", "plan": PLAN["plan"] | {"time_s": {}}}).text

    assert "memory, generation2.00 GiB30.00 GiB" in text and "time, generation" not in text
    assert "time, updatenot planned2.0s1.1s" in text and "kept for later" not in text


@pytest.mark.parametrize("plan", [None, "{", {"plan": 3}, {"plan": {"peak_gib": None, "memory_gib": [1]}}])
def test_without_a_usable_plan_the_report_stands(make, plan):
    page = make(plan)

    assert "Curves" in page.text
    if plan == "{":
        assert "plan.json is damaged" in page.text


def test_a_deviation_needs_both_numbers():
    assert deviation(4.0, 3.0) == "-25.0%" and deviation(None, 3.0) == deviation(0.0, 1.0) == deviation(4.0, None) == ""
