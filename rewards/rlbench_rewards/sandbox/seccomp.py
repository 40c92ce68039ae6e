"""The system call filter of a job, assembled in Python: refused calls fail with EPERM, unknown ones with ENOSYS.

A filter is a list of `struct sock_filter` (code, jump if true, jump if false, k), run for every call over
`struct seccomp_data` (nr, arch, instruction_pointer, args[6]).
Source: linux/Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import os
import struct

# name: (x86_64, aarch64); None where the architecture lacks the call.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # network; socketpair stays, asyncio needs it
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # kernel machinery with a history of escapes
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "fanotify_init": (300, 262),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "lookup_dcookie": (212, 18),
    # mounts, namespaces, files by handle
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    # memory that no limit counts, and objects that outlive a process
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semctl": (66, 191),
    "msgget": (68, 186),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # the machine
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "syslog": (103, 116),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "iopl": (172, None),
    "ioperm": (173, None),
    "vhangup": (153, 58),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
}

# Refused as well where the job shares the host's process ids and files (Landlock knows neither signals nor modes).
_REFUSED_WITHOUT_NAMESPACES: dict[str, tuple[int | None, int | None]] = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "setsid": (112, 157),  # a job is killed by its process group: nothing may leave it
    "setpgid": (109, 154),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "utimensat": (280, 88),
    "futimesat": (261, None),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}

_SPECIAL = {
    "seccomp": (317, 277),
    "fork": (57, None),
    "vfork": (58, None),
    "clone": (56, 220),
    "clone3": (435, 435),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "tgkill": (234, 131),
    "ioctl": (16, 29),
}
_NEWEST_KNOWN = 462  # mseal, Linux 6.10; what came later (and the x32 calls) does not exist for a job
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN = {"x86_64": 0, "aarch64": 1}

_LOAD, _JUMP_EQ, _JUMP_GT, _JUMP_SET, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_NR_OFFSET, _ARCH_OFFSET, _ARGS_OFFSET = 0, 4, 16

_CLONE_THREAD = 0x00010000
_CLONE_NEW_ANYTHING = 0x7E020080  # NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME
_PR_SET_PDEATHSIG, _PR_SET_PTRACER, _TIOCSTI, _TIOCLINUX = 1, 0x59616D61, 0x5412, 0x541C


def is_supported() -> bool:
    return os.uname().machine in _COLUMN


def base_filter(*, has_namespaces: bool, own_pid: int) -> bytes:
    """What every job may not do. `own_pid` is the only process it may signal where it shares the host's ids."""
    column = _COLUMN[os.uname().machine]
    refused = dict(_REFUSED) if has_namespaces else {**_REFUSED, **_REFUSED_WITHOUT_NAMESPACES}
    program = _prologue()
    for numbers in refused.values():
        program += _on_call(numbers[column], [_result(_ERRNO | _EPERM)])
    program += _on_call(_SPECIAL["clone3"][column], [_result(_ERRNO | _ENOSYS)])  # its flags cannot be read here
    program += _on_call(_SPECIAL["clone"][column], _refuse_if_set(0, _CLONE_NEW_ANYTHING))
    program += _on_call(_SPECIAL["prctl"][column], _refuse_if_equal(0, [_PR_SET_PDEATHSIG, _PR_SET_PTRACER]))
    program += _on_call(_SPECIAL["ioctl"][column], _refuse_if_equal(1, [_TIOCSTI, _TIOCLINUX]))
    program += _on_call(_SPECIAL["prlimit64"][column], _refuse_unless_equal(0, 0))  # own limits only
    if not has_namespaces:
        program += _on_call(_SPECIAL["tgkill"][column], _refuse_unless_equal(0, own_pid))
    return b"".join([*program, _result(_ALLOW)])


def last_filter(*, allow_subprocess: bool) -> bytes:
    """No further filter; unless allowed, threads but no new process."""
    column = _COLUMN[os.uname().machine]
    program = _prologue()
    for name in ("seccomp",) if allow_subprocess else ("seccomp", "fork", "vfork"):
        program += _on_call(_SPECIAL[name][column], [_result(_ERRNO | _EPERM)])
    if not allow_subprocess:
        program += _on_call(_SPECIAL["clone"][column], _refuse_unless_set(0, _CLONE_THREAD))
    return b"".join([*program, _result(_ALLOW)])


def _prologue() -> list[bytes]:
    return [
        _op(_LOAD, _ARCH_OFFSET),
        _op(_JUMP_EQ, _AUDIT_ARCH[os.uname().machine], 1, 0),
        _result(_KILL),
        _op(_LOAD, _NR_OFFSET),
        _op(_JUMP_GT, _NEWEST_KNOWN, 0, 1),
        _result(_ERRNO | _ENOSYS),
    ]


def _on_call(number: int | None, body: list[bytes]) -> list[bytes]:
    """`body` ends in a return; it is jumped over for other calls. The accumulator holds the call's number."""
    if number is None:
        return []
    return [_op(_JUMP_EQ, number, 0, len(body)), *body]


def _refuse_if_equal(argument: int, values: list[int]) -> list[bytes]:
    checks = [_op(_JUMP_EQ, value, len(values) - index, 0) for index, value in enumerate(values)]
    return [_load(argument), *checks, _result(_ALLOW), _result(_ERRNO | _EPERM)]


def _refuse_unless_equal(argument: int, value: int) -> list[bytes]:
    return [_load(argument), _op(_JUMP_EQ, value, 1, 0), _result(_ERRNO | _EPERM), _result(_ALLOW)]


def _refuse_if_set(argument: int, mask: int) -> list[bytes]:
    return [_load(argument), _op(_JUMP_SET, mask, 1, 0), _result(_ALLOW), _result(_ERRNO | _EPERM)]


def _refuse_unless_set(argument: int, mask: int) -> list[bytes]:
    return [_load(argument), _op(_JUMP_SET, mask, 1, 0), _result(_ERRNO | _EPERM), _result(_ALLOW)]


def _load(argument: int) -> bytes:
    """The low 32 bits of an argument: all that flags, options and process ids use."""
    return _op(_LOAD, _ARGS_OFFSET + 8 * argument)


def _result(value: int) -> bytes:
    return _op(_RETURN, value)


def _op(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, k)
