"""All processes of one job together: their memory and their number, where no limit of the kernel sums them."""

import os
import subprocess
import sys
import time

import pytest

from rlbench_rewards.sandbox.backends import ISOLATED
from rlbench_rewards.sandbox.grading import grade_tests, run_script
from rlbench_rewards.sandbox.limits import Limits
from rlbench_rewards.sandbox.supervisor import Sandbox
from rlbench_rewards.sandbox.tree_watch import members

WITH_CHILDREN = Limits(timeout_s=20.0, memory_mib=128, allow_subprocess=True)
HOLD = """
import os, time
for _ in range(5):
    if os.fork() == 0:
        kept = b'x' * (80 << 20)
        time.sleep(60)
time.sleep(60)
"""
SHARE = """
import os
kept = b'x' * (60 << 20)
pids = []
for _ in range(8):
    pid = os.fork()
    if pid == 0:
        found = kept.count(b'x')
        import time; time.sleep(0.5)
        os._exit(found != len(kept))
    pids.append(pid)
print([os.waitpid(pid, 0)[1] for pid in pids])
"""
MANY = """
import os, time
count = 0
for _ in range(100):
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        count += 1
    except OSError:
        break
time.sleep(0.5)
print(count, flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module", params=ISOLATED)
def sandbox(request, reports):
    if not reports[request.param].is_good:
        pytest.skip(f"backend {request.param} is not available here")
    with Sandbox(request.param) as sandbox:
        yield sandbox


def test_children_that_hold_too_much_together_are_stopped_long_before_the_deadline(sandbox):
    start = time.monotonic()
    run = run_script(sandbox, HOLD, limits=WITH_CHILDREN)

    assert run.stopped_by == "memory limit" and run.end.status == -9 and not run.has_survivors
    assert time.monotonic() - start < 5.0


def test_memory_that_children_share_with_their_parent_counts_once(sandbox):
    run = run_script(sandbox, SHARE, limits=WITH_CHILDREN)

    assert (run.output, run.stopped_by) == (b"[0, 0, 0, 0, 0, 0, 0, 0]\n", "")


def test_more_processes_than_allowed_are_refused_or_stopped(sandbox):
    run = run_script(sandbox, MANY, limits=Limits(timeout_s=20.0, num_processes=20, allow_subprocess=True))

    assert run.stopped_by == "process limit" or int(run.output) < 20
    assert not run.has_survivors


def test_a_function_whose_children_hold_too_much_fails_its_tests_and_says_why(sandbox):
    code = f"def f():\n    exec({HOLD!r})\ndef g():\n    return 1"
    verdicts = grade_tests(sandbox, code, [{"code": "assert g() == 1"}, {"code": "f()"}], limits=WITH_CHILDREN)

    assert [v.passed for v in verdicts] == [True, False] and verdicts[1].message == "stopped by the memory limit"


def test_an_honest_program_may_use_the_processes_it_is_allowed(sandbox):
    code = "import subprocess\nprint(subprocess.run(['/bin/echo', 'hi'], capture_output=True).stdout)"

    assert run_script(sandbox, code, limits=WITH_CHILDREN).output == b"b'hi\\n'\n"


def test_the_tree_is_the_job_with_descendants_and_orphans_of_its_group():
    job = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os\nos.setpgid(0, 0)\nprint('x', flush=True)\nif os.fork() == 0: os.fork()\ninput()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert job.stdout is not None and job.stdout.read(1) == b"x"
        deadline = time.monotonic() + 10
        while len(tree := members(os.getpid(), job.pid)) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(tree) == 3 and tree[0] == job.pid
        assert other.pid not in tree and os.getpid() not in tree
    finally:
        os.killpg(job.pid, 9)
        other.kill()
        job.wait()
        other.wait()
