"""The reward: what is a wrong answer, what is an error, and how rows and completions are read."""

import base64
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest

import rlbench_rewards
from rlbench_rewards import RewardError, RewardSample
from rlbench_rewards.code_extraction import extract_program, suspicious_marks
from rlbench_rewards.code_outputs import outputs_equal
from rlbench_rewards.code_rows import InputCase, read_task
from rlbench_rewards.code_tests import CodeTests
from rlbench_rewards.sandbox import choice
from rlbench_rewards.sandbox.probes import PROBES, ProbeResult, Report

RIGHT = "Here:\n```python\ndef add(a, b):\n    return a + b\n```"
WRONG = RIGHT.replace("a + b", "a - b")
ADD = {"test_list": ["assert add(2, 3) == 5", "assert add(0, 0) == 0"]}


@pytest.fixture(scope="module")
def reward():
    try:
        reward = CodeTests(timeout_s=2.0, total_timeout_s=3.0)
    except ValueError as error:
        pytest.skip(str(error))
    yield reward
    reward.close()


def score(reward, completion, row):
    return reward(RewardSample(prompt="", completion=completion, columns=row))


def test_right_wrong_and_missing_programs(reward):
    assert score(reward, RIGHT, ADD).value == 1.0
    assert score(reward, WRONG, ADD).value == 0.0
    assert score(reward, "I do not know.", ADD).value == 0.0
    assert score(reward, "<think>```python\nx = 1\n```", ADD).details["reason"] == "no program in the completion"


def test_it_agrees_with_its_own_unit_cases(reward):
    cases = reward.unit_cases()

    assert {case.expected for case in cases} == {0.0, 1.0}
    assert [score(reward, case.completion, case.columns).value for case in cases] == [case.expected for case in cases]


def test_a_project_below_tmp_is_not_hidden_by_the_scratch_of_the_jobs(reward):
    program = (
        "from rlbench_rewards import RewardSample; from rlbench_rewards.code_tests import CodeTests\n"
        f"reward = CodeTests(backend={reward.backend!r}, timeout_s=5.0)\n"
        f"print(reward(RewardSample(prompt='', completion={RIGHT!r}, columns={ADD!r})).value)\nreward.close()"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        shutil.copytree(Path(rlbench_rewards.__file__).parent, Path(folder) / "rlbench_rewards")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)

    assert done.stdout == "1.0\n", done.stderr


def test_details_show_the_level_and_the_gap_between_visible_and_hidden_tests(reward):
    row = {
        "entry_point": "add",
        "tests": [{"args": [2, 3], "expected": 5}],
        "hidden_tests": [{"args": [1, 1], "expected": 2}],
    }
    output = score(reward, "```python\ndef add(a, b):\n    return 5\n```", row)

    assert output.value == 0.0 and output.details["sandbox"] == reward.backend
    assert (output.details["visible_pass_frac"], output.details["hidden_pass_frac"]) == (1.0, 0.0)
    assert (
        output.details["visible_hidden_gap"] == 1.0 and output.details["first_failure"] == "test 1: the result differs"
    )


def test_a_fraction_counts_the_tests_that_passed(reward):
    fraction = CodeTests(score="fraction", backend=reward.backend, timeout_s=2.0)

    assert score(fraction, WRONG, ADD).value == 0.5
    fraction.close()


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"question": "2 + 2"}, "no tests, it has the columns question"),
        ({"test_list": ["assert add(1 1)"]}, "no Python"),
        (
            {"test_list": ["assert add(1, 1) == 2"], "test_setup_code": "1 / 0"},
            "setup of the tests raised ZeroDivisionError",
        ),
        ({"test_list": ["import numpy_is_not_here"]}, "numpy_is_not_here"),
        ({"test_list": ["assert add(lambda: 1, 2) == 3"]}, "type function cannot cross"),
        ({"tests": [{"args": [1], "expected": 2}]}, "expected entry_point"),
        ({"tests": [{"input": "1", "output": "2"}, "assert f(1) == 2"]}, "mixes"),
        ({"input_output": '{"inputs": [1], "outputs": []}'}, "cannot be read"),
        ({"public_test_cases": "[{}]"}, "cannot be read"),
    ],
)
def test_a_row_whose_tests_do_not_work_is_an_error_and_never_zero(row, what, reward):
    with pytest.raises(RewardError, match=what):
        score(reward, RIGHT, row)


def test_an_endless_program_is_wrong_and_in_time(reward):
    cases = {"tests": [{"input": "", "output": "x"}] * 5}
    output = score(reward, "```python\nwhile True:\n    pass\n```", cases)

    assert output.value == 0.0 and output.details["num_passed"] == 0


def test_a_dead_zygote_is_replaced_and_the_program_graded(reward):
    assert score(reward, RIGHT, ADD).value == 1.0
    zygote = reward._sandbox._zygote
    zygote._process.kill()
    zygote._process.wait()

    assert score(reward, RIGHT, ADD).value == 1.0 and score(reward, WRONG, ADD).value == 0.0


def test_without_isolation_it_refuses_with_remedies_unless_told_by_name(monkeypatch):
    nothing = [ProbeResult(name=probe.name, is_contained=False) for probe in PROBES]
    monkeypatch.setattr(choice, "_probed", lambda kind: Report(kind=kind, results=nothing))
    monkeypatch.setattr(choice, "_strongest", choice._strongest.__wrapped__)

    with pytest.raises(ValueError, match="apt-get install bubblewrap(.|\n)*user namespaces(.|\n)*lsm=landlock"):
        CodeTests()
    with pytest.raises(ValueError, match="does not isolate here"):
        CodeTests(backend="namespaces")
    with pytest.raises(ValueError, match="i_understand: true"):
        CodeTests(backend="unsafe_subprocess")
    unsafe = CodeTests(backend="unsafe_subprocess", i_understand=True)
    assert score(unsafe, RIGHT, ADD).details["sandbox"] == "unsafe_subprocess"
    unsafe.close()


@pytest.mark.parametrize(
    ("kwargs", "what"),
    [
        ({"score": "half"}, "score is 'half', expected one of: all, fraction"),
        ({"block": "middle"}, "block is 'middle'"),
        ({"compare": "roughly"}, "compare is 'roughly'"),
        ({"backend": "docker"}, "backend is 'docker'"),
        ({"timeout_s": 30.0}, "total_timeout_s is 20.0, expected at least timeout_s, 30.0"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0, expected a positive number"),
        ({"memory_mib": 8}, "memory_mib is 8, expected at least 64"),
    ],
)
def test_bad_settings_are_named(kwargs, what):
    with pytest.raises(ValueError, match=what):
        CodeTests(**kwargs)


@pytest.mark.parametrize(
    ("completion", "policy", "program"),
    [
        ("```python\na\n```\ntext\n```py\nb\n```", "last", "b\n"),
        ("```python\na\n```\ntext\n```py\nb\n```", "first", "a\n"),
        ("```\nlonger one\n```\n```\nb\n```", "longest", "longer one\n"),
        ("```python\na\n```\n```bash\nls\n```", "last", "a\n"),
        ("<think>```python\na\n```</think>\n```python\nb\n```", "first", "b\n"),
        ("    return 1", "last", "    return 1"),
        ("```python\nunfinished", "last", None),
        ("", "last", None),
    ],
)
def test_the_program_in_a_completion(completion, policy, program):
    assert extract_program(completion, policy) == program


def test_suspicious_marks_are_counted():
    assert suspicious_marks("import sys\nsys.exit(0)\nclass A:\n    def __eq__(self, o): ...") == {
        "exit": 1,
        "own_equality": 1,
    }


@pytest.mark.parametrize(
    ("actual", "expected", "mode", "tolerance", "is_equal"),
    [
        ("1 2\n3", "1\n2 3 \n", "tokens", 0.0, True),
        ("1 2", "1 2 3", "tokens", 0.0, False),
        ("1 2\n3\n", "1 2\n3", "lines", 0.0, True),
        ("1\n2 3", "1 2\n3", "lines", 0.0, False),
        ("a \n", "a\n", "exact", 0.0, False),
        ("0.3333333", "0.33333334", "tokens", 1e-6, True),
        ("0.3333333", "0.33333334", "tokens", 0.0, False),
        ("0.34", "0.33", "tokens", 1e-6, False),
        ("nan", "1", "tokens", 1e-6, False),
        ("inf", "1e308", "tokens", 1e-6, False),
    ],
)
def test_outputs(actual, expected, mode, tolerance, is_equal):
    assert outputs_equal(actual, expected, mode, tolerance) == is_equal


def test_packed_private_tests_are_read_and_packed_code_is_not_run():
    cases = json.dumps([{"input": "1", "output": "2", "testtype": "stdin"}])
    pack = lambda value: base64.b64encode(zlib.compress(pickle.dumps(value))).decode()  # noqa: E731

    assert read_task({"private_test_cases": pack(cases)}).hidden == [InputCase(input="1", output="2")]
    with pytest.raises(RewardError, match="expected plain text"):
        read_task({"private_test_cases": pack(print)})


def test_a_completion_goes_on_from_the_prompt_or_repeats_it(reward):
    prompt = 'from typing import List\n\ndef first(xs: List[int]) -> int:\n    """The first."""\n'
    row = {
        "prompt": prompt,
        "entry_point": "first",
        "test": "def check(candidate):\n    assert candidate([4, 5]) == 4\n",
    }

    assert score(reward, "    return xs[0]\n", row).value == 1.0
    assert score(reward, "```python\ndef first(xs: List[int]) -> int:\n    return xs[0]\n```", row).value == 1.0
    assert score(reward, "    return xs[1]\n", row).value == 0.0
