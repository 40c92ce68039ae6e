"""The pool: hard deadlines, honest outcomes, nothing left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from rlbench_rewards import RewardPool, RewardSample

PREFIXES = ["tests.rewards.bad_rewards."]
ROOT = Path(__file__).parents[2]


def spec(name: str) -> dict:
    return {"name": name, "path": f"tests.rewards.bad_rewards.{name}", "kwargs": {}}


def sample(completion: str, **columns) -> RewardSample:
    return RewardSample(prompt="", completion=completion, columns=columns)


@pytest.fixture(scope="module")
def pool():
    with RewardPool([spec("misbehave")], num_workers=2, timeout_s=1.0, allowed_prefixes=PREFIXES) as pool:
        yield pool


def outcome(pool, completion: str):
    return pool.score([sample(completion)])[0]["misbehave"]


@pytest.mark.parametrize("hang", ["sleep", "hold the interpreter lock"])
def test_a_call_that_hangs_is_a_timeout_at_its_deadline_and_the_pool_goes_on(pool, hang):
    start = time.monotonic()
    result = outcome(pool, hang)
    elapsed = time.monotonic() - start

    assert (result.status, result.value) == ("timeout", None)
    assert elapsed < 3  # the call would last for 30 s and more
    assert outcome(pool, "fine").value == 0.5


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("raise", "ZeroDivisionError"),
        ("nan", "expected a finite number"),
        ("inf", "expected a finite number"),
        ("none", "returned NoneType"),
        ("bare float", "returned float, expected RewardOutput"),
        ("bool", "True, expected a number"),
        ("text", "'1.0', expected a number"),
        ("exit", "the worker died twice"),
        ("system exit", "the worker died twice"),
    ],
)
def test_a_broken_verifier_is_an_error_and_never_a_zero(pool, broken, message):
    result = outcome(pool, broken)

    assert (result.status, result.value) == ("error", None)
    assert message in result.message


def test_what_a_reward_prints_does_not_disturb_the_answers(pool):
    assert outcome(pool, "print").value == 0.25


def test_outcomes_come_in_the_order_of_the_samples_among_failures(pool):
    texts = ["fine", "exit", "fine", "sleep", "raise", "fine"] * 2

    statuses = [result["misbehave"].status for result in pool.score([sample(text) for text in texts])]

    assert statuses == ["value", "error", "value", "timeout", "error", "value"] * 2


def test_a_worker_that_dies_once_is_replaced_and_the_call_tried_again(tmp_path):
    with RewardPool([spec("die_once")], num_workers=1, timeout_s=5, allowed_prefixes=PREFIXES) as pool:
        assert pool.score([sample("", marker=str(tmp_path / "m"))])[0]["die_once"].value == 1.0


def test_killing_workers_in_mid_batch_costs_no_answer():
    with RewardPool([spec("length")], num_workers=2, timeout_s=5, allowed_prefixes=PREFIXES) as pool:
        victims = pool.pids()
        killer = threading.Timer(0.02, lambda: [os.kill(pid, signal.SIGKILL) for pid in victims])
        killer.start()
        results = pool.score([sample("x" * i) for i in range(3000)])
        killer.join()

        assert [result["length"].value for result in results] == [float(i) for i in range(3000)]


def test_several_components_and_trl_style_functions():
    with RewardPool([spec("length"), spec("trl_style"), spec("trl_wrong_length")], num_workers=2, timeout_s=5,
                    allowed_prefixes=PREFIXES) as pool:  # fmt: skip
        (result,) = pool.score([sample("4", answer="4", unused=1)])

    assert result["length"].value == 1.0
    assert result["trl_style"].value == 1.0
    assert (
        result["trl_wrong_length"].status == "error"
        and "returned 2 values for 1 completions" in result["trl_wrong_length"].message
    )


@pytest.mark.parametrize("name", ["trl_array", "trl_truth"])
def test_arrays_and_truth_values_of_a_trl_style_function_are_numbers(name):
    with RewardPool([spec(name)], num_workers=1, timeout_s=5, allowed_prefixes=PREFIXES) as pool:
        (result,) = pool.score([sample("")])

    assert (result[name].status, result[name].value) == ("value", 1.0)


def test_it_works_from_another_thread(pool):
    results = []
    thread = threading.Thread(target=lambda: results.append(outcome(pool, "fine").value))
    thread.start()
    thread.join(timeout=20)

    assert results == [0.5]


BAD_SPECS = {
    "prefix": ("os.system", {}, r"os.system, which may not be imported; .*rewards.allowed_prefixes"),
    "module": ("rlbench_rewards.nothing.X", {}, "rlbench_rewards.nothing cannot be imported"),
    "name": ("rlbench_rewards.math_answer.MathAnswr", {}, "no MathAnswr; nearest names: MathAnswer"),
    "kwargs": ("rlbench_rewards.math_answer.MathAnswer", {"extrct": []}, "kwargs do not fit .*extrct"),
    "values": ("rlbench_rewards.math_answer.MathAnswer", {"extract": ["x"]}, "extract is"),
    "signature": ("tests.rewards.bad_rewards.no_arguments", {}, "expected a function of one RewardSample"),
}


@pytest.mark.parametrize("name", BAD_SPECS)
def test_a_reward_that_cannot_be_built_is_a_clear_error_at_start(name):
    path, kwargs, message = BAD_SPECS[name]

    with pytest.raises(ValueError, match=message):
        RewardPool(
            [{"name": "x", "path": path, "kwargs": kwargs}], num_workers=1, timeout_s=1, allowed_prefixes=PREFIXES
        )


def children() -> set[int]:
    files = Path("/proc/self/task").glob("*/children")  # by the thread that started them
    return {int(pid) for file in files for pid in file.read_text().split()}


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="needs Linux's /proc")
def test_no_child_is_left_after_close():
    before = children()
    pool = RewardPool([spec("length")], num_workers=2, timeout_s=1, allowed_prefixes=PREFIXES)
    assert len(children() - before) == 2

    pool.close()

    assert children() == before


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is signalled on Linux only")
def test_workers_end_when_their_parent_is_killed():
    code = f"""
    import sys; sys.path[:0] = {[str(ROOT), str(ROOT / "rewards")]!r}
    from rlbench_rewards import RewardPool
    pool = RewardPool([{spec("length")!r}], num_workers=2, timeout_s=1, allowed_prefixes={PREFIXES!r})
    print(*pool.pids(), flush=True)
    input()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()

    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
