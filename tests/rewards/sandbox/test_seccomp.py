"""The system call filter, run by a small interpreter of its own instruction set, for both architectures."""

import os
import struct
from types import SimpleNamespace

import pytest

from rlbench_rewards.sandbox.seccomp import base_filter, last_filter

ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# name: (x86_64, aarch64), from the kernel's headers
NUMBERS = {
    **{"read": (0, 63), "openat": (257, 56), "socketpair": (53, 199), "socket": (41, 198), "ptrace": (101, 117)},
    **{"mount": (165, 40), "bpf": (321, 280), "unshare": (272, 97), "memfd_create": (319, 279), "clone": (56, 220)},
    **{"clone3": (435, 435), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261), "prctl": (157, 167)},
    **{
        "ioctl": (16, 29),
        "setsid": (112, 157),
        "seccomp": (317, 277),
        "fchmodat": (268, 53),
        "io_uring_setup": (425, 425),
    },
}


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request, monkeypatch):
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=request.param, sysname="Linux"))
    return request.param


def verdict(program: bytes, machine: str, name: str, *arguments: int, arch: int | None = None) -> int:
    number = NUMBERS[name][machine == "aarch64"] if name in NUMBERS else int(name)
    data = struct.pack("<iIQ6Q", number, arch or ARCH[machine], 0, *(list(arguments) + [0] * 6)[:6])
    instructions = list(struct.iter_unpack("=HBBI", program))
    position = accumulator = 0
    while True:
        code, if_true, if_false, k = instructions[position]
        position += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif code == 0x06:
            return k
        else:
            is_true = {0x15: accumulator == k, 0x25: accumulator > k, 0x45: bool(accumulator & k)}[code]
            position += if_true if is_true else if_false


def test_ordinary_calls_pass_and_dangerous_ones_fail(machine):
    program = base_filter(has_namespaces=True, own_pid=1)

    assert all(
        verdict(program, machine, name) == ALLOW for name in ("read", "openat", "socketpair", "kill", "fchmodat")
    )
    refused = ("socket", "ptrace", "mount", "bpf", "unshare", "memfd_create", "io_uring_setup")
    assert all(verdict(program, machine, name) == EPERM for name in refused)


def test_arguments_decide_where_a_call_has_both_uses(machine):
    program = base_filter(has_namespaces=True, own_pid=1)

    assert verdict(program, machine, "clone", 17) == ALLOW  # SIGCHLD: a plain fork
    assert verdict(program, machine, "clone", 0x10000000) == EPERM  # CLONE_NEWUSER
    assert verdict(program, machine, "clone3") == ENOSYS
    assert verdict(program, machine, "prlimit64", 0) == ALLOW and verdict(program, machine, "prlimit64", 7) == EPERM
    assert verdict(program, machine, "prctl", 15) == ALLOW and verdict(program, machine, "prctl", 1) == EPERM
    assert verdict(program, machine, "ioctl", 0, 0x5401) == ALLOW
    assert verdict(program, machine, "ioctl", 0, 0x5412) == EPERM  # TIOCSTI types into a terminal


def test_without_namespaces_no_process_but_its_own_is_signalled(machine):
    program = base_filter(has_namespaces=False, own_pid=77)

    assert all(verdict(program, machine, name) == EPERM for name in ("kill", "setsid", "fchmodat"))
    assert verdict(program, machine, "tgkill", 77) == ALLOW and verdict(program, machine, "tgkill", 78) == EPERM


def test_the_last_filter_allows_threads_and_no_processes(machine):
    strict, open_one = last_filter(allow_subprocess=False), last_filter(allow_subprocess=True)

    assert verdict(strict, machine, "clone", 17) == EPERM and verdict(strict, machine, "clone", 0x3D0F00) == ALLOW
    assert verdict(open_one, machine, "clone", 17) == ALLOW
    assert verdict(strict, machine, "seccomp") == EPERM == verdict(open_one, machine, "seccomp")


def test_unknown_calls_and_foreign_architectures_do_not_get_through(machine):
    for program in (base_filter(has_namespaces=True, own_pid=1), last_filter(allow_subprocess=True)):
        assert verdict(program, machine, "463") == ENOSYS and verdict(program, machine, str(0x40000029)) == ENOSYS
        assert verdict(program, machine, "read", arch=0x40000003) == KILL  # i386
