"""How the zygote shuts itself and its jobs in. One class per kind of isolation, each with the same steps.

enter()    once, in the zygote, which is trusted: namespaces and a root of its own.
fork()     a job's process; 0 in the child, as os.fork.
confine()  in the job, before it hears of any model-written code: private scratch, no capabilities, no new privileges,
           system call filter. Nothing of it can be undone.
kill()     the job and all it started; clean_up() what it left; leave() when the zygote ends.
"""

from __future__ import annotations

import os

from rlbench_rewards.sandbox import landlock, seccomp, syscalls

_CHILD_NAMESPACES = (
    syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWUTS
)
_SCRATCH_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_STAGES = ("/tmp", "/mnt", "/run", "/sys")  # the new root is mounted over one of them, in our own mount namespace
_NOBODY = 65534


class NamespacesJail:
    """Own user (unless root), mount, pid, ipc, net and uts namespaces; a root made of read-only binds."""

    def __init__(self, profile: dict) -> None:
        self._profile = profile
        self._own_pids = -1
        self._job_uid: int | None = None
        self._call_filter = seccomp.base_filter(has_namespaces=True, own_pid=1)  # assembled once, for all jobs

    def enter(self) -> None:
        uid, gid = os.geteuid(), os.getegid()
        try:
            syscalls.unshare(_CHILD_NAMESPACES)
            self._job_uid = _first_usable_uid(self._profile["job_uid"])
        except PermissionError:
            syscalls.unshare(_CHILD_NAMESPACES | syscalls.CLONE_NEWUSER)
            _map_ids(uid, gid)
        _be_the_first_victim()
        _continue_in_child()
        self._own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
        _build_root(self._profile["read_folders"])
        syscalls.drop_capability_bounds()

    def fork(self) -> int:
        """The job is pid 1 of a pid namespace of its own: with it die all of its descendants."""
        syscalls.unshare(syscalls.CLONE_NEWPID)
        pid = os.fork()
        if pid:
            syscalls.setns(self._own_pids, syscalls.CLONE_NEWPID)
        return pid

    def confine(self) -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        options = f"size={self._profile['scratch_bytes']},nr_inodes=16384,mode=1777"
        syscalls.mount("tmpfs", "/tmp", "tmpfs", _SCRATCH_FLAGS, options)
        os.chdir("/tmp")
        if self._job_uid is not None:
            _become(self._job_uid)
        _give_up_privileges(self._call_filter)

    def kill(self, pid: int) -> None:
        os.kill(pid, 9)

    def clean_up(self, pid: int) -> None:
        """Nothing: the scratch was a mount of the job's own namespace."""

    def leave(self) -> None:
        """Nothing, for the same reason."""


class BubblewrapJail(NamespacesJail):
    """Inside of bwrap, which made the namespaces and the root; a job gets its own pid and mount namespaces within."""

    def enter(self) -> None:
        _be_the_first_victim()
        self._own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._job_uid = _first_usable_uid(self._profile["job_uid"]) if self._profile["is_root"] else None
        syscalls.drop_capability_bounds()

    def confine(self) -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("tmpfs", "/proc", "tmpfs", _SCRATCH_FLAGS | syscalls.MS_RDONLY, "size=4k")
        options = f"size={self._profile['scratch_bytes']},nr_inodes=16384,mode=1777"
        syscalls.mount("tmpfs", "/tmp", "tmpfs", _SCRATCH_FLAGS, options)
        os.chdir("/tmp")
        if self._job_uid is not None:
            _become(self._job_uid)
        _give_up_privileges(self._call_filter)


class LandlockJail:
    """No namespaces: files behind Landlock, signals and file modes behind seccomp, one process group a job."""

    def __init__(self, profile: dict) -> None:
        self._profile = profile
        self._leaves_root = False

    def enter(self) -> None:
        if syscalls.landlock_abi() == 0:
            raise OSError(95, "Landlock is not available")
        _be_the_first_victim()
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)  # a job's orphans become ours, to be waited for
        syscalls.drop_capability_bounds()
        # Where nobody cannot reach the interpreter (a root's home folder), jobs stay root, without capabilities.
        self._leaves_root = os.geteuid() == 0 and all(map(_is_open_to_all, self._profile["read_folders"]))
        if self._leaves_root:
            os.chown(self._profile["scratch_folder"], _NOBODY, _NOBODY)

    def fork(self) -> int:
        return os.fork()

    def confine(self) -> None:
        os.setpgid(0, 0)
        scratch = self._scratch(os.getpid())
        os.mkdir(scratch, 0o700)
        if self._leaves_root:
            os.chown(scratch, _NOBODY, _NOBODY)
        os.chdir(scratch)
        landlock_folders = [folder for folder in self._profile["read_folders"] if os.path.isdir(folder)]
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        landlock.restrict(landlock_folders, scratch, list(_DEVICES))
        if self._leaves_root:
            _become(_NOBODY)
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, 9)  # after the change of user, which clears it
        os.environ["TMPDIR"] = os.environ["HOME"] = scratch
        _give_up_privileges(seccomp.base_filter(has_namespaces=False, own_pid=os.getpid()))

    def kill(self, pid: int) -> None:
        for target in (-pid, pid):
            try:
                os.kill(target, 9)
            except ProcessLookupError:
                continue

    def clean_up(self, pid: int) -> None:
        """After the death of the job: wait for the rest of its process group, remove its scratch folder."""
        try:
            while True:
                os.waitpid(-pid, 0)
        except ChildProcessError:
            pass
        _remove_tree(self._scratch(pid))

    def leave(self) -> None:
        _remove_tree(self._profile["scratch_folder"])

    def _scratch(self, pid: int) -> str:
        return f"{self._profile['scratch_folder']}/{pid}"


class NoJail(LandlockJail):
    """Limits and a clean environment, no isolation. Only for who asked for it by name."""

    def enter(self) -> None:
        if os.uname().sysname == "Linux":
            syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)

    def confine(self) -> None:
        os.setpgid(0, 0)
        scratch = self._scratch(os.getpid())
        os.mkdir(scratch, 0o700)
        os.chdir(scratch)
        os.environ["TMPDIR"] = os.environ["HOME"] = scratch


JAILS = {
    "bubblewrap": BubblewrapJail,
    "namespaces": NamespacesJail,
    "landlock": LandlockJail,
    "unsafe_subprocess": NoJail,
}


def _give_up_privileges(call_filter: bytes) -> None:
    """For good; the zygote has emptied the set of capabilities that a program could gain."""
    syscalls.drop_capabilities()
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    syscalls.install_seccomp(call_filter)


def _become(uid: int) -> None:
    """Leave root. A root's limit of processes is never enforced by the kernel, an ordinary user's is."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _first_usable_uid(wanted: int) -> int | None:
    """A user for the jobs of a root zygote: nobody where a user namespace around us does not map the wanted one."""
    with open("/proc/self/uid_map") as file:
        ranges = [[int(part) for part in line.split()] for line in file]
    for uid in (wanted, _NOBODY):
        if any(first <= uid < first + count for first, _, count in ranges):
            return uid
    return None


def _is_open_to_all(folder: str) -> bool:
    """Whether every user may walk to the folder."""
    while folder != "/":
        if os.path.isdir(folder) and not os.stat(folder).st_mode & 0o001:
            return False
        folder = os.path.dirname(folder)
    return True


def _map_ids(uid: int, gid: int) -> None:
    """The user is nobody inside of its user namespace."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{_NOBODY} {uid} 1"), ("gid_map", f"{_NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _be_the_first_victim() -> None:
    """Out of memory, the kernel takes a job and not the trainer."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        return


def _continue_in_child() -> None:
    """A new pid namespace begins with the next child; this process only waits for it."""
    pid = os.fork()
    if pid:
        os.closerange(0, 1024)
        os.waitpid(pid, 0)
        os._exit(0)
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, 9)


def _build_root(read_folders: list[str]) -> None:
    stage = next(s for s in _STAGES if os.path.isdir(s) and not any(f.startswith(s) for f in read_folders))
    devices = [device for device in _DEVICES if os.path.exists(device)]
    device_sources = [os.open(device, os.O_PATH | os.O_CLOEXEC) for device in devices]
    syscalls.mount("tmpfs", stage, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "size=1m,mode=755")
    for folder in read_folders:
        _bind(folder, stage + folder)
    for folder in ("tmp", "proc", "dev", "var"):
        os.makedirs(f"{stage}/{folder}", exist_ok=True)
    os.symlink("/tmp", f"{stage}/dev/shm")
    os.symlink("/tmp", f"{stage}/var/tmp")
    for device in devices:
        os.close(os.open(stage + device, os.O_CREAT | os.O_WRONLY, 0o666))
    read_only = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID
    syscalls.set_mount_attributes(stage, read_only | syscalls.MOUNT_ATTR_NODEV)
    for device, source in zip(devices, device_sources, strict=True):
        syscalls.mount(f"/proc/self/fd/{source}", stage + device, flags=syscalls.MS_BIND)
        syscalls.set_mount_attributes(stage + device, read_only)
        os.close(source)
    syscalls.pivot_root(stage)


def _bind(source: str, target: str) -> None:
    """Make `source` appear at `target`; a symbolic link (/lib on most systems) is copied as one."""
    if os.path.islink(source):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(source), target)
    elif os.path.isdir(source):
        os.makedirs(target, mode=0o755, exist_ok=True)
        syscalls.mount(source, target, flags=syscalls.MS_BIND | syscalls.MS_REC)


def _remove_tree(folder: str) -> None:
    """A job's scratch, without following links; it may hold folders that even its owner cannot list."""
    for path, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(f"{path}/{name}")
        for name in folders:
            inner = f"{path}/{name}"
            os.unlink(inner) if os.path.islink(inner) else os.rmdir(inner)
    if os.path.isdir(folder):
        os.rmdir(folder)
