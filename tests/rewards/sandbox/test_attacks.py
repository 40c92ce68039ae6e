"""No attack gets a reward, every honest program does, on every backend that works here, as root and as nobody."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from rlbench_rewards.sandbox.backends import ISOLATED
from rlbench_rewards.sandbox.grading import run_script
from rlbench_rewards.sandbox.limits import Limits
from rlbench_rewards.sandbox.supervisor import Sandbox
from tests.rewards.sandbox.attack_suite import ALL, BOMBS, Graders
from tests.rewards.sandbox.attacks_on_host import POISONING
from tests.rewards.sandbox.ordinary_user import run_as_nobody

ROOT = Path(__file__).parents[3]
CATEGORIES = [
    *("early exits", "equality deception", "monkeypatching the referee", "reading the answers", "forging the result"),
    *("time", "memory", "processes", "output", "disk", "containment", "gaming visible tests", "mutants", "honest"),
]


def test_the_suite_covers_every_category_and_is_large():
    counts = Counter(case.category for case in ALL)

    assert set(counts) == set(CATEGORIES) and min(counts.values()) >= 3
    assert sum(count for category, count in counts.items() if category not in ("mutants", "honest")) >= 100
    assert len({case.name for case in ALL}) == len(ALL)


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.category}-{case.name}")
def test_the_best_backend_gives_the_right_verdict(case, graders, reports):
    if case.may_pass_without in open_probes(reports[graders.backend]):
        pytest.skip(f"backend {graders.backend} does not bound this: probe {case.may_pass_without!r} is open")

    assert graders.value(case) == case.value


@pytest.mark.parametrize("kind", ISOLATED)
def test_other_backends_give_the_right_verdicts_too(kind, best, reports):
    if kind == best:
        pytest.skip(f"{kind} is the best backend here, tested with every case")
    if not reports[kind].is_good:
        pytest.skip(f"backend {kind} is not available here: {reports[kind].why_not or 'a required probe is open'}")
    open_ones = open_probes(reports[kind])
    cases = [case for case in ALL if case.may_pass_without not in open_ones and not case.is_slow]

    graders = Graders(kind)
    wrong = {case.name: value for case in cases if (value := graders.value(case)) != case.value}
    graders.close()

    assert len(cases) > 100 and not wrong


@pytest.mark.parametrize("kind", ISOLATED)
def test_as_an_ordinary_user_every_verdict_is_right(kind):
    if os.geteuid() != 0:
        pytest.skip("the tests run as an ordinary user already")
    done = run_as_nobody(["-m", "tests.rewards.sandbox.attack_suite", kind], ROOT, timeout_s=240)
    if done.returncode == 1 and ("does not isolate here" in done.stderr or "PermissionError" in done.stderr):
        pytest.skip(f"{kind} is not for an ordinary user here: {done.stderr.strip().splitlines()[-1]}")

    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    cases = [case for case in ALL if not case.is_slow]
    wrong = {case.name: result["values"][case.name] for case in cases if result["values"][case.name] != case.value}
    if kind == "landlock":
        wrong = {name: value for name, value in wrong.items() if "disk" not in cases_by_name()[name].may_pass_without}
    assert result["uid"] != 0 and result["backend"] == kind and not wrong and not result["too_late"]


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_over_by_its_deadline_and_one_second(name, graders):
    assert graders.is_over_in_time(cases_by_name()[name])


@pytest.mark.parametrize("pair", POISONING, ids=range(len(POISONING)))
def test_a_program_cannot_spoil_the_next_one(pair, best):
    with Sandbox(best) as sandbox:
        runs = [run_script(sandbox, program, limits=Limits()) for program in (*pair, pair[1])]

    assert all(b"open" not in run.output for run in runs)


def cases_by_name():
    return {case.name: case for case in ALL}


def open_probes(report) -> set[str]:
    return {result.name for result in report.results if not result.is_contained}
