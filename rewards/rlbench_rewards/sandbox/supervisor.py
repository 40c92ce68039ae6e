"""The trusted side: starts a zygote, hands jobs their work, watches their deadlines and kills them.

One Sandbox serves one thread. Its jobs end with it; a supervisor killed with -9 takes its zygote and jobs along,
because their control stream ends.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlbench_rewards.sandbox import backends
from rlbench_rewards.sandbox.codec import MAX_FRAME_BYTES, CodecError, decode, encode
from rlbench_rewards.sandbox.frames import MAX_DESCRIPTORS, ChannelClosed, send_frame
from rlbench_rewards.sandbox.limits import Limits
from rlbench_rewards.sandbox.tree_watch import TreeWatch

START_DEADLINE_S = 20.0
_KILL_DEADLINE_S = 2.0
_MAX_JOBS_PER_ZYGOTE = 2000
_NUM_SPARES = 2
_NICER = 10


class SandboxError(Exception):
    """The sandbox itself did not work. Nothing is known about the program; it is never scored 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnd:
    """How a job's process ended."""

    status: int  # exit status, or minus the signal
    cpu_s: float
    memory_bytes: int  # the largest resident size


class Job:
    """One confined process that waits for its work."""

    def __init__(self, number: int, connection: socket.socket) -> None:
        self.number = number
        self.connection = connection
        self.pid = 0  # as we see it; known once it is started
        connection.settimeout(START_DEADLINE_S)  # a job that does not read must not hold us

    def start(self, spec: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Give the job its work.

        Raises:
            SandboxError: it could not confine itself, or is gone.
        """
        try:
            deadline = time.monotonic() + START_DEADLINE_S
            self.pid = _sender(self.connection, deadline)
            first = decode(receive_before(self.connection, deadline))
            if "failed" in first:
                raise SandboxError(f"a job could not confine itself: {first['failed']}")
            if spec["limits"]["allow_subprocess"] and self.pid:
                _make_nice(self.pid)
            send_frame(self.connection, encode(spec), tuple(descriptors))  # type: ignore[arg-type]
        except (ChannelClosed, CodecError, DeadlinePassed, TimeoutError) as error:
            raise SandboxError(f"a job did not start ({type(error).__name__})") from error


class DeadlinePassed(Exception):
    pass


class Sandbox:
    """A warm zygote of one kind, and its jobs.

    Args:
        kind: one of `backends.KINDS`.
        package_folders: read-only folders that jobs may import from, e.g. a site-packages folder.
    """

    def __init__(self, kind: str, *, package_folders: Sequence[str] = ()) -> None:
        self.kind = kind
        self._package_folders = list(package_folders)
        self._zygote: _Zygote | None = None

    def take_job(self) -> Job:
        """A confined process; a dead or old zygote is replaced first.

        Raises:
            SandboxError: no zygote can be started.
        """
        if not self.is_alive() or self._zygote is None or self._zygote.num_jobs >= _MAX_JOBS_PER_ZYGOTE:
            self.close()
            self._zygote = _Zygote(self.kind, self._package_folders)
        try:
            return self._zygote.take_job()
        except (ChannelClosed, DeadlinePassed, CodecError, OSError) as error:
            self.close()
            raise SandboxError(f"the zygote of backend {self.kind} died ({type(error).__name__})") from error

    def end(self, job: Job, *, wait: bool = True) -> JobEnd | None:
        """Kill the job and all it started. With `wait`, after its last process is gone.

        Raises:
            SandboxError: the zygote does not answer; it is killed, and every job with it.
        """
        job.connection.close()
        if self._zygote is None:
            return None
        try:
            return self._zygote.end_job(job.number, wait)
        except (ChannelClosed, DeadlinePassed, CodecError, OSError) as error:
            self.close()
            raise SandboxError(f"the zygote of backend {self.kind} died ({type(error).__name__})") from error

    def watch(self, job: Job, limits: Limits) -> TreeWatch:
        """Bound all processes of a started job together."""
        return TreeWatch(self._zygote.pid if self._zygote is not None else 0, job.pid, limits)

    def is_alive(self) -> bool:
        return self._zygote is not None and self._zygote.is_alive()

    def close(self) -> None:
        """End the zygote and every job."""
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Zygote:
    """The supervisor's end of one zygote; see `zygote` for the protocol."""

    def __init__(self, kind: str, package_folders: Sequence[str]) -> None:
        why = backends.unavailable_because(kind)
        if why:
            raise SandboxError(f"backend {kind}: {why}")
        self.num_jobs = 0
        self._spares: list[Job] = []
        self._ends: dict[int, JobEnd] = {}
        self._num_promised = 0
        self._scratch_folder = "" if kind in backends.WITH_OWN_SCRATCH else tempfile.mkdtemp(prefix="rlbench-sandbox-")
        profile = backends.profile(kind, scratch_folder=self._scratch_folder, package_folders=package_folders)
        self._control, theirs = socket.socketpair()
        self._errors = tempfile.TemporaryFile()
        try:
            with theirs:
                self._process = self._started(kind, theirs, profile["read_folders"])  # type: ignore[arg-type]
            send_frame(self._control, encode(profile))
            answer = self._receive()
        except (ChannelClosed, DeadlinePassed, CodecError, OSError) as error:
            self.close()
            raise SandboxError(f"backend {kind}: {self._last_error() or type(error).__name__}") from error
        if "failed" in answer:
            self.close()
            raise SandboxError(f"backend {kind}: {answer['failed']}")

    def take_job(self) -> Job:
        while self._num_promised + len(self._spares) < _NUM_SPARES:
            self._request_fork()
        while not self._spares:
            self._take_message()
        self._request_fork()
        return self._spares.pop(0)

    def end_job(self, number: int, wait: bool) -> JobEnd | None:
        send_frame(self._control, encode({"end": number}))
        while wait and number not in self._ends:
            self._take_message()
        return self._ends.pop(number, None)

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._control.close()
        for job in self._spares:
            job.connection.close()
        process = getattr(self, "_process", None)
        if process is not None:
            try:
                process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                pass
            _kill_group(process)
        if self._scratch_folder:
            shutil.rmtree(self._scratch_folder, ignore_errors=True)

    def _started(self, kind: str, control: socket.socket, folders: Sequence[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            backends.start_command(kind, control.fileno(), folders),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=backends.environment(),
            cwd="/",
            pass_fds=[control.fileno()],
            start_new_session=True,
        )

    def _request_fork(self) -> None:
        self.num_jobs += 1
        self._num_promised += 1
        send_frame(self._control, encode({"fork": self.num_jobs}))

    def _take_message(self) -> None:
        message = self._receive()
        if "ended" in message:
            status, cpu_s, memory = message["status"], message["cpu_s"], message["memory_bytes"]
            self._ends[message["ended"]] = JobEnd(status=status, cpu_s=cpu_s, memory_bytes=memory)
            while len(self._ends) > 64:  # of jobs that nobody waits for
                self._ends.pop(next(iter(self._ends)))

    def _receive(self) -> dict[str, Any]:
        """The next message; a new job's socket comes with the first byte of its message."""
        deadline = time.monotonic() + START_DEADLINE_S
        _wait_readable(self._control, deadline)
        header, descriptors, _, _ = socket.recv_fds(self._control, 4, MAX_DESCRIPTORS)
        if not header:
            raise ChannelClosed
        header += _receive_exactly(self._control, 4 - len(header), deadline)
        message = decode(_receive_exactly(self._control, struct.unpack("<I", header)[0], deadline))
        if "forked" in message:
            self._num_promised -= 1
            self._spares.append(Job(message["forked"], socket.socket(fileno=descriptors[0])))
        return message

    def _last_error(self) -> str:
        """The last line on stderr: bwrap and Python say there why they did not start."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the zygote's process group, which its jobs belong to, and wait until nothing of it runs."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # the latter where only a zombie of a job's user is left
        pass
    process.wait()
    deadline = time.monotonic() + _KILL_DEADLINE_S
    while is_group_running(process.pid) and time.monotonic() < deadline:
        time.sleep(0.002)


def is_group_running(group: int) -> bool:
    """Whether a process of the group lives. A zombie does not: some containers never reap orphans."""
    for entry in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        try:
            with open(f"/proc/{entry}/stat") as file:
                state, _, its_group = file.read().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(its_group) == group and state not in "ZX":
            return True
    return False


def receive_before(connection: socket.socket, deadline: float) -> bytes:
    """One frame.

    Raises:
        DeadlinePassed, ChannelClosed, CodecError
    """
    (size,) = struct.unpack("<I", _receive_exactly(connection, 4, deadline))
    if size > MAX_FRAME_BYTES:
        raise CodecError(f"a frame of {size} bytes")
    return _receive_exactly(connection, size, deadline)


def _make_nice(pid: int) -> None:
    """So that a bomb of processes cannot keep the zygote and us from the processor, and from killing it."""
    try:
        os.setpriority(os.PRIO_PROCESS, pid, min(19, os.getpriority(os.PRIO_PROCESS, 0) + _NICER))
    except ProcessLookupError:
        return


def _sender(connection: socket.socket, deadline: float) -> int:
    """Process id, in our numbers, of who sent what is waiting; the kernel says it."""
    _wait_readable(connection, deadline)
    space = socket.CMSG_SPACE(struct.calcsize("3i"))
    _, ancillary, _, _ = connection.recvmsg(1, space, socket.MSG_PEEK)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            return struct.unpack("3i", data)[0]
    return 0


def _receive_exactly(connection: socket.socket, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        _wait_readable(connection, deadline)
        try:
            part = connection.recv(min(size - len(data), 2**18))
        except ConnectionResetError:
            part = b""
        if not part:
            raise ChannelClosed
        data += part
    return bytes(data)


def _wait_readable(connection: socket.socket, deadline: float) -> None:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise DeadlinePassed
