"""A process of the fork server is what a new interpreter is, but for what is imported."""

import json
import signal
import subprocess
import sys

import pytest

from tests.loops.conftest import ENVIRONMENT, SERVER, run, start
from tests.loops.test_rl_runs import read_until

STATE = """
import json, os, random, signal, sys, threading
import torch
print(json.dumps({
    "arguments": sys.argv, "name": __name__, "folder": os.getcwd(), "path": sys.path, "environment": dict(os.environ),
    "signals": {str(s): str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)},
    "num_threads": [len(os.listdir("/proc/self/task")), torch.get_num_threads(), threading.active_count()],
    "dtype": str(torch.get_default_dtype()),
    "input": sys.stdin.read(), "encodings": [sys.stdout.encoding, sys.stderr.errors],
    "descriptors": sorted(os.listdir("/proc/self/fd"))[:-1], "session": os.getsid(0) == os.getpid(),
}))
"""
END = """
import atexit, sys, threading, time
atexit.register(lambda: print("at exit"))
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("to errors", file=sys.stderr)
{end}
"""


def afresh(program: str, folder, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, env=ENVIRONMENT | {"OPENBLAS_NUM_THREADS": "1"},
        capture_output=True, text=True, stdin=subprocess.DEVNULL, start_new_session=True, timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs inherit it ignored
    )  # fmt: skip


def test_it_begins_in_the_state_of_a_new_interpreter(tmp_path):
    forked = json.loads(run("a=1", "-m", folder=tmp_path, program=STATE).stdout)
    new = json.loads(afresh(STATE, tmp_path, "a=1", "-m").stdout)

    assert new["environment"].pop("OPENBLAS_NUM_THREADS") == "1"
    assert forked == new


def test_no_two_draw_the_same_numbers(tmp_path):
    program = "import numpy, random, torch; print(random.random(), numpy.random.rand(), torch.rand(()).item())"
    draws = [run(folder=tmp_path, program=program).stdout.split() for _ in range(2)]

    assert [len(draw) for draw in draws] == [3, 3]
    assert not set(draws[0]) & set(draws[1])


@pytest.mark.parametrize(("end", "status"), [("", 0), ("sys.exit(7)", 7), ("raise ValueError('no')", 1)])
def test_it_ends_as_a_new_interpreter_does(tmp_path, end, status):
    forked, new = (call(END.format(end=end)) for call in (
        lambda program: run(folder=tmp_path, program=program), lambda program: afresh(program, tmp_path)
    ))  # fmt: skip

    assert forked.returncode == new.returncode == status
    assert forked.stdout == new.stdout == "thread\nat exit\n"
    assert (
        forked.stderr.splitlines()[0] == "to errors" and forked.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_ends_it_and_is_its_status(tmp_path, number):
    process = SERVER.start([], tmp_path, program="import time; print('here', flush=True); time.sleep(100)")
    read_until("here", process)
    assert process.poll() is None

    process.send_signal(number)

    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == process.poll() == -number


def test_one_that_does_not_end_in_time_is_killed(tmp_path):
    process = SERVER.start([], tmp_path, program="import time; time.sleep(100)")

    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.5)

    assert process.wait(20) == -signal.SIGKILL


def test_it_runs_the_module_with_its_errors_among_its_output(tmp_path):
    process = start("optim.lr=-1", folder=tmp_path)

    assert "error: optim.lr is -1.0, expected more than 0" in process.communicate(timeout=60)[0]
    assert process.returncode == 2
