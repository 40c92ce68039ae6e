"""Bounds for all processes of one job together, where it may start some: no limit of the kernel's sums them.

A thread looks at the job's tree every 20 ms and kills the job once the tree holds too much. What it takes until then
comes on top.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from rlbench_rewards.sandbox.limits import Limits

_INTERVAL_S = 0.02
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
MEMORY, PROCESSES = "memory limit", "process limit"


class TreeWatch:
    """Watches a job while the `with` block runs.

    Args:
        zygote: process id of the zygote's first process; a job's orphans may become its children.
        job: process id of the job; it must not be waited for inside of the block.
        limits: nothing is watched unless they allow processes.

    Attributes:
        exceeded: MEMORY or PROCESSES once the job was killed for it, else "".
    """

    def __init__(self, zygote: int, job: int, limits: Limits) -> None:
        self.exceeded = ""
        self._zygote, self._job, self._limits = zygote, job, limits
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True) if limits.allow_subprocess and job else None

    def __enter__(self) -> TreeWatch:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(_INTERVAL_S):
            tree = members(self._zygote, self._job)
            if len(tree) > self._limits.num_processes:
                self.exceeded = PROCESSES
            elif _holds_more(tree, self._limits.total_memory_bytes):
                self.exceeded = MEMORY
            if self.exceeded:
                _kill(self._job)
                return


def members(zygote: int, job: int) -> list[int]:
    """The job, its descendants, and orphans of its process group below the zygote."""
    found: list[int] = []
    waiting = [(zygote, False)]
    while waiting:
        pid, is_inside = waiting.pop()
        is_inside = is_inside or pid == job or _group(pid) == job
        if is_inside:
            found.append(pid)
        waiting += [(child, is_inside) for child in _children(pid)]
    return found


def _children(pid: int) -> list[int]:
    children: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            children += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    except (OSError, ValueError):
        pass  # it has ended
    return children


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:
        return 0


def _holds_more(tree: list[int], limit_bytes: int) -> bool:
    """Resident memory; what processes share counts once, which is only looked at where it can matter: it is slow."""
    return sum(map(_resident_bytes, tree)) > limit_bytes and sum(map(_own_share_bytes, tree)) > limit_bytes


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def _own_share_bytes(pid: int) -> int:
    """A page that n processes share counts as 1/n; where the kernel does not tell, whole."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return _resident_bytes(pid)


def _kill(job: int) -> None:
    """With its process group, where it leads one: the other jobs die by their namespace."""
    try:
        if _group(job) == job:
            os.killpg(job, signal.SIGKILL)
        os.kill(job, signal.SIGKILL)
    except ProcessLookupError:
        return
