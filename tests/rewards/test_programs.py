"""Right programs of the rows of code data sets pass; the same with one mistake fail, as in plain execution."""

from collections import Counter
from dataclasses import replace

import pytest

from rlbench_rewards import RewardSample
from rlbench_rewards.code_tests import CodeTests
from tests.rewards.programs import of_live_code_bench_form
from tests.rewards.programs.equivalent import EQUIVALENT
from tests.rewards.programs.mutations import KINDS, mutants
from tests.rewards.programs.rows import human_eval_problem, human_eval_rows, mbpp_problem, mbpp_rows
from tests.rewards.programs.trusted import run_trusted

HUMAN_EVAL = ["on_numbers", "on_text", "on_lists", "on_records"]
SETS = {
    **{module: [human_eval_problem(row) for row in human_eval_rows(module)] for module in HUMAN_EVAL},
    "mbpp": [mbpp_problem(row, row["task_id"].split("/")[1]) for row in mbpp_rows("of_mbpp_form")],
    "livecodebench": of_live_code_bench_form.PROBLEMS,
}
PROBLEMS = [problem for problems in SETS.values() for problem in problems]


def new_reward(timeout_s: float) -> CodeTests:
    try:
        return CodeTests(timeout_s=timeout_s)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def patient():
    """For programs that must pass."""
    reward = new_reward(15.0)
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def quick():
    """For programs that must fail, some by never ending."""
    reward = new_reward(0.4)
    yield reward
    reward.close()


def value(reward: CodeTests, problem, completion: str) -> float:
    return reward(RewardSample(prompt="", completion=completion, columns=problem.row)).value


def fenced(program: str) -> str:
    return f"<think>It is simple.</think>Here it is:\n```python\n{program}\n```\nI hope that helps."


def test_the_tasks_are_many_and_each_form_is_there():
    assert sum(len(SETS[module]) for module in HUMAN_EVAL) >= 50
    assert len(SETS["mbpp"]) >= 7 and len(SETS["livecodebench"]) >= 6
    assert len({problem.name for problem in PROBLEMS}) == len(PROBLEMS)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_a_right_program_passes(problem, patient):
    assert value(patient, problem, fenced(problem.program)) == 1.0
    sample = RewardSample(prompt="", completion="", columns=problem.row)
    gold = patient.gold_completion(sample)
    assert (gold is None) == ("public_test_cases" in problem.row)
    assert gold is None or patient(replace(sample, completion=gold)).value == 1.0


@pytest.mark.parametrize("name", SETS)
def test_a_program_with_one_mistake_gets_the_verdict_of_plain_execution(name, patient, quick):
    changed = [(problem, mutant) for problem in SETS[name] for mutant in mutants(problem.program, problem.function)]
    passes = run_trusted([problem.judged(mutant.program) for problem, mutant in changed])
    cases = [(problem, mutant, does) for (problem, mutant), does in zip(changed, passes, strict=True)]
    wrong = [
        (problem.name, mutant.change, does)
        for problem, mutant, does in cases
        if value(patient if does else quick, problem, fenced(mutant.program)) != float(does)
    ]

    assert not wrong
    names = {problem.name for problem in SETS[name]}
    assert {(p.name, m.change) for p, m, does in cases if does} == {key for key in EQUIVALENT if key[0] in names}
    assert {problem.name for problem, _, does in cases if not does} == names


def test_every_kind_of_mistake_is_made():
    kinds = Counter(mutant.kind for p in PROBLEMS for mutant in mutants(p.program, p.function))

    assert set(kinds) == set(KINDS) and min(kinds.values()) >= 15 and sum(kinds.values()) >= 800


def test_the_mistakes_in_a_small_function():
    found = mutants("def f(n):\n    '''n.'''\n    if n > 1 and n in S:\n        n += 2\n    return n\nx = 1", "f")

    assert {(mutant.kind, mutant.change) for mutant in found} == {
        ("operator", "n += 2 -> n -= 2"),
        ("comparison", "if n > 1 and n in S: -> if n >= 1 and n in S:"),
        ("comparison", "if n > 1 and n in S: -> if n > 1 and n not in S:"),
        ("logic", "if n > 1 and n in S: -> if n > 1 or n in S:"),
        ("constant", "if n > 1 and n in S: -> if n > 2 and n in S:"),
        ("constant", "n += 2 -> n += 3"),
        ("condition", "if n > 1 and n in S: -> if not (n > 1 and n in S):"),
        ("dropped statement", "if n > 1 and n in S: -> pass"),
        ("dropped statement", "n += 2 -> pass"),
        ("dropped statement", "return n -> pass"),
    }
