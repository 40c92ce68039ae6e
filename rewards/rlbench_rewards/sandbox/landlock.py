"""Landlock rules of a job on the host's own file system: read what Python needs, write the scratch folder only."""

from __future__ import annotations

import os

from rlbench_rewards.sandbox import syscalls

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_DEVICE = _READ_FILE | _WRITE_FILE
_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_MAKE_DEVICES = (1 << 6) | (1 << 11)  # character and block devices
_CONNECT_AND_BIND = 3  # ABI 4
_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS = 3  # ABI 6


def restrict(read_folders: list[str], scratch: str, devices: list[str]) -> None:
    """Close this thread's view of the files; the rest of the host's files can no longer be opened.

    Raises:
        OSError: the kernel has no Landlock or refuses the rules.
    """
    abi = syscalls.landlock_abi()
    if abi == 0:
        raise OSError(95, "Landlock is not available")
    handled = _RIGHTS_BY_ABI[min(abi, 5)]
    network = _CONNECT_AND_BIND if abi >= 4 else 0
    scoped = _SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS if abi >= 6 else 0
    ruleset = syscalls.landlock_create(handled, network, scoped, abi)
    for folder in read_folders:
        _allow(ruleset, folder, handled & _READ)
    for device in devices:
        _allow(ruleset, device, handled & _DEVICE)
    _allow(ruleset, scratch, handled & ~_MAKE_DEVICES)
    syscalls.landlock_restrict(ruleset)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    if not os.path.exists(path):
        return
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        is_folder = os.path.isdir(path)
        syscalls.landlock_allow(ruleset, descriptor, rights if is_folder else rights & ~_READ_DIR)
    finally:
        os.close(descriptor)
