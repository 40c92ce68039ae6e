"""Starting, feeding, watching and ending jobs; and what is left of them: nothing."""

import os
import subprocess
import sys
import threading
import time

import pytest

from rlbench.commands.sandbox import sandbox as sandbox_command
from rlbench_rewards.sandbox import supervisor
from rlbench_rewards.sandbox.grading import BrokenTests, grade_tests, run_script
from rlbench_rewards.sandbox.limits import Limits
from rlbench_rewards.sandbox.supervisor import Sandbox, SandboxError, is_group_running

LIMITS = Limits(timeout_s=5.0)


@pytest.fixture(scope="module")
def sandbox(best):
    with Sandbox(best) as sandbox:
        yield sandbox


def test_a_program_gets_its_input_and_gives_output_errors_and_status(sandbox):
    text = "x" * 5_000_000 + "\n"
    run = run_script(
        sandbox,
        "import sys\nprint(len(sys.stdin.read()), sys.argv[1:])\nprint('e', file=sys.stderr)\nsys.exit(3)",
        text,
        arguments=["a", "b"],
        limits=LIMITS,
    )

    assert run.output == b"5000001 ['a', 'b']\n" and run.errors == b"e\n" and run.end.status == 3
    assert run.stopped_by == "" and not run.has_survivors and run.end.memory_bytes > 2**20


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("1 / 0", 1),
        ("raise SystemExit('sorry')", 1),
        ("import os\nos.abort()", -6),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", -11),
        ("import ctypes\nctypes.string_at(0)", -11),
        ("def f(): (", 1),
    ],
)
def test_how_a_program_ended(code, status, sandbox):
    end = run_script(sandbox, code, limits=LIMITS).end.status

    # As pid 1 of its namespace a process can ignore what it sends itself.
    assert end == status or (code.startswith("import os") and end in (0, -11))


def test_what_is_printed_before_a_stop_is_kept(sandbox):
    run = run_script(sandbox, "print('early', flush=True)\nwhile True: pass", limits=Limits(timeout_s=0.5))

    assert run.output == b"early\n" and run.stopped_by == "deadline" and run.end.status == -9


def test_the_environment_of_the_trainer_does_not_cross(best, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-the-trainer")
    with Sandbox(best) as fresh:
        run = run_script(fresh, "import os\nprint(sorted(os.environ))", limits=LIMITS)

    assert b"HOME" in run.output and b"WANDB" not in run.output


def test_an_old_zygote_is_replaced(best, monkeypatch):
    monkeypatch.setattr(supervisor, "_MAX_JOBS_PER_ZYGOTE", 4)
    with Sandbox(best) as fresh:
        pids = set()
        for _ in range(6):
            assert run_script(fresh, "print(1)", limits=LIMITS).output == b"1\n"
            pids.add(fresh._zygote._process.pid)  # type: ignore[union-attr]

    assert len(pids) > 1


def test_sandboxes_in_threads_do_not_disturb_each_other(best):
    outputs: dict[int, list[bytes]] = {}

    def work(number: int) -> None:
        with Sandbox(best) as own:
            outputs[number] = [run_script(own, f"print({number} * {i})", limits=LIMITS).output for i in range(5)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert outputs == {number: [f"{number * i}\n".encode() for i in range(5)] for number in range(4)}


def test_a_zygote_that_dies_under_a_job_is_no_verdict(best):
    with Sandbox(best) as fresh:
        run_script(fresh, "print(1)", limits=LIMITS)
        timer = threading.Timer(0.3, lambda: os.killpg(fresh._zygote._process.pid, 9))  # type: ignore[union-attr]
        timer.start()
        with pytest.raises(SandboxError):
            grade_tests(
                fresh, "import time\ntime.sleep(60)", [{"code": "assert f() == 1"}], limits=Limits(timeout_s=20.0)
            )
        timer.join()

        assert run_script(fresh, "print(2)", limits=LIMITS).output == b"2\n"


def test_broken_tests_are_told_from_failed_ones(sandbox):
    with pytest.raises(BrokenTests, match="ZeroDivisionError"):
        grade_tests(sandbox, "x = 1", [{"code": "assert x"}], setup="1 / 0", limits=LIMITS)

    verdicts = grade_tests(sandbox, "x = 1", [{"code": "assert x == 1"}, {"code": "assert x == 2"}], limits=LIMITS)
    assert [verdict.passed for verdict in verdicts] == [True, False]


_SUPERVISOR = """
import sys, time
from rlbench_rewards.sandbox.grading import run_script
from rlbench_rewards.sandbox.limits import Limits
from rlbench_rewards.sandbox.supervisor import Sandbox
sandbox = Sandbox(sys.argv[1])
run_script(sandbox, "print(1)", limits=Limits())
print(sandbox._zygote._process.pid, flush=True)
run_script(sandbox, "import os, time\\nos.fork()\\nos.fork()\\ntime.sleep(600)",
           limits=Limits(timeout_s=600.0, allow_subprocess=True))
"""


def test_a_supervisor_killed_with_9_leaves_no_process(best):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-c", _SUPERVISOR, best]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        group = int(process.stdout.readline())  # type: ignore[union-attr]
        time.sleep(0.3)
        assert is_group_running(group)
        process.kill()

    deadline = time.monotonic() + 5.0
    while is_group_running(group) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_group_running(group)


def test_a_closed_sandbox_leaves_no_process(best):
    with Sandbox(best) as fresh:
        run_script(fresh, "print(1)", limits=LIMITS)
        group = fresh._zygote._process.pid  # type: ignore[union-attr]
        assert is_group_running(group)

    assert not is_group_running(group)


def test_the_doctor_shows_each_probe_and_exits_by_its_verdict(reports, capsys):
    status = sandbox_command(["doctor"])
    text = capsys.readouterr().out

    good = [kind for kind, report in reports.items() if report.is_good]
    assert status == (0 if good else 3)
    assert all(word in text for word in ("bubblewrap", "namespaces", "landlock", "unix sockets", "verdict: "))
    assert not good or f"verdict: {good[0]} will be used" in text
    assert sandbox_command(["cure"]) == 2
