"""Which programs end without an exception, found by plain execution: for programs that we wrote, and only for those.

`python -m tests.rewards.programs.trusted < programs.json` prints a JSON list of true and false.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CPU_LIMIT_S = 0.5
_ROOT = Path(__file__).parents[3]


def run_trusted(programs: Sequence[str]) -> list[bool]:
    """Each program in a process of its own, of at most CPU_LIMIT_S of processor time and 1 GiB."""
    command = [sys.executable, "-m", "tests.rewards.programs.trusted"]
    environment = {"PYTHONPATH": os.pathsep.join([str(_ROOT), str(_ROOT / "rewards")]), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, input=json.dumps(programs), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def _ends_well(program: str) -> bool:
    pid = os.fork()
    if pid == 0:
        _run(program)
    return os.waitpid(pid, 0)[1] == 0


def _run(program: str) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)  # its signal ends the process
    try:
        exec(compile(program, "program", "exec"), {"__name__": "program"})
    except BaseException:
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    print(json.dumps([_ends_well(program) for program in json.load(sys.stdin)]))
