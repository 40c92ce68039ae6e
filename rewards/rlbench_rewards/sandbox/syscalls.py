"""Linux calls that the standard library lacks, through ctypes. A failed call raises OSError with the call's name.

Imported by the zygote, whose start is on the clock: nothing here imports more than ctypes and os.
"""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4

PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 24, 36, 38

_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446  # the same on both
_CAPABILITY_VERSION_3 = 0x20080522

_LIBC = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    _checked("unshare", _LIBC.unshare(ctypes.c_int(flags)))


def setns(descriptor: int, flags: int) -> None:
    _checked("setns", _LIBC.setns(ctypes.c_int(descriptor), ctypes.c_int(flags)))


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    arguments = [source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), options.encode()]
    _checked(f"mount {target}", _LIBC.mount(*arguments))


def set_mount_attributes(target: str, attributes: int) -> None:
    """Add attributes to the mount and everything mounted below it (Linux 5.12)."""
    value = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)  # attr_set, attr_clr, propagation, userns_fd
    where = [ctypes.c_int(_AT_FDCWD), ctypes.c_char_p(target.encode()), ctypes.c_uint(_AT_RECURSIVE)]
    size = ctypes.c_size_t(ctypes.sizeof(value))
    _checked(f"mount_setattr {target}", _syscall(_MOUNT_SETATTR, *where, ctypes.byref(value), size))


def pivot_root(new_root: str) -> None:
    """Make `new_root`, a mount point, the root; the old one is gone afterwards."""
    os.chdir(new_root)
    _checked("pivot_root", _syscall(_PIVOT_ROOT[os.uname().machine], ctypes.c_char_p(b"."), ctypes.c_char_p(b".")))
    _checked("umount2", _LIBC.umount2(b".", ctypes.c_int(MNT_DETACH)))
    os.chdir("/")


def prctl(option: int, value: int = 0) -> None:
    zero = ctypes.c_ulong(0)
    _checked(f"prctl {option}", _LIBC.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero))


def drop_capability_bounds() -> None:
    """No program started from here can gain a capability."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            return  # EINVAL: past the last one. EPERM: we had none to drop


def drop_capabilities() -> None:
    """Effective, permitted and inheritable capabilities become empty."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    call = _CAPSET[os.uname().machine]
    _checked("capset", _syscall(call, ctypes.byref(header), ctypes.byref(nothing)))


class _FilterProgram(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = [("length", ctypes.c_ushort), ("filters", ctypes.c_char_p)]


def install_seccomp(program: bytes) -> None:
    """Install a filter of `struct sock_filter`s for this thread and its children; needs no_new_privs."""

    value = _FilterProgram(len(program) // 8, program)
    mode = ctypes.c_uint(1)  # SECCOMP_SET_MODE_FILTER
    _checked("seccomp", _syscall(_SECCOMP[os.uname().machine], mode, ctypes.c_uint(0), ctypes.byref(value)))


def landlock_abi() -> int:
    """Version of the kernel's Landlock; 0 without it."""
    return max(0, _syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1)))


def landlock_create(handled_files: int, handled_network: int, scoped: int, abi: int) -> int:
    """A rule set's descriptor. Older kernels know a shorter struct."""
    value = (ctypes.c_uint64 * 3)(handled_files, handled_network, scoped)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    arguments = [ctypes.byref(value), ctypes.c_size_t(size), ctypes.c_uint(0)]
    return _checked("landlock_create_ruleset", _syscall(_LANDLOCK_CREATE, *arguments))


def landlock_allow(ruleset: int, folder: int, rights: int) -> None:
    class Rule(ctypes.Structure):
        _pack_ = 1
        _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]

    value = Rule(rights, folder)
    arguments = [ctypes.c_int(ruleset), ctypes.c_int(1), ctypes.byref(value), ctypes.c_uint(0)]
    _checked("landlock_add_rule", _syscall(_LANDLOCK_ADD, *arguments))


def landlock_restrict(ruleset: int) -> None:
    _checked("landlock_restrict_self", _syscall(_LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint(0)))


def _syscall(number: int, *arguments: object) -> int:
    return _LIBC.syscall(ctypes.c_long(number), *arguments)


def _checked(call: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result
