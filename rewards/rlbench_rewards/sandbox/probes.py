"""Programs that try what a job must not be able to do. A backend is trusted for what they show, not for its name."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlbench_rewards.sandbox.backends import environment
from rlbench_rewards.sandbox.grading import ScriptRun, run_script
from rlbench_rewards.sandbox.limits import Limits
from rlbench_rewards.sandbox.supervisor import Sandbox, SandboxError
from rlbench_rewards.sandbox.tree_watch import MEMORY

_CONTAINED, _OPEN = "contained", "open"
_SHORT_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One thing to try. The program prints "contained" or "open"; `judge` sees what it cannot say itself."""

    name: str
    what: str
    program: str
    is_required: bool = True
    limits: Limits = Limits(timeout_s=10.0)
    judge: Callable[[ScriptRun, Host], bool] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    name: str
    is_contained: bool
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All probes of one backend."""

    kind: str
    results: list[ProbeResult]
    why_not: str = ""  # the backend does not start
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        required = {probe.name for probe in PROBES if probe.is_required}
        return not self.why_not and all(result.is_contained for result in self.results if result.name in required)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the programs try to reach: open to every user of this machine."""

    folder: str
    secret: str
    port: int
    abstract_name: str

    @property
    def arguments(self) -> list[str]:
        return [self.folder, self.secret, str(self.port), self.abstract_name, str(os.getpid())]


_HEADER = """
import os, socket, sys
folder, secret, port, abstract_name, host_pid = sys.argv[1:]
def attempt(action):
    try:
        action()
    except (OSError, ImportError, MemoryError):
        return
    print("open")
    raise SystemExit
"""
_FOOTER = """
print("contained")
"""

_FILES_READ = """
attempt(lambda: open(secret).read())
attempt(lambda: os.listdir(folder))
for home in ("/root", "/home", "/etc"):
    attempt(lambda: [open(f"{home}/{name}").read() for name in (os.listdir(home) or [1 // 0])]
            if any(os.path.isfile(f"{home}/{name}") for name in os.listdir(home)) else open("/none"))
"""
_FILES_WRITE = """
for place in (folder, "/var/tmp/..", "/usr", "/", "/dev", os.path.dirname(os.__file__)):
    attempt(lambda: open(f"{place}/rlbench-probe", "w").write("x"))
"""
_ENVIRONMENT = f"""
attempt(lambda: open("/none") if set(os.environ) <= {set(environment()) | {"PWD", "TMPDIR", "LC_CTYPE"}} else None)
"""
_TCP = """
attempt(lambda: socket.create_connection(("127.0.0.1", int(port)), 1))
"""
_UNIX = """
def connect():
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(1)
    connection.connect(chr(0) + abstract_name)
attempt(connect)
"""
_PROCESSES = """
attempt(lambda: open(f"/proc/{host_pid}/environ").read())
attempt(lambda: open(f"/proc/{host_pid}/cmdline").read())
attempt(lambda: os.kill(int(host_pid), 0))
attempt(lambda: os.kill(-1, 0) if os.getpid() != 1 else open("/none"))
attempt(lambda: os.setpriority(os.PRIO_PROCESS, int(host_pid), 19))
"""
_KERNEL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
attempt(lambda: checked(libc.unshare(0x10000000)))
attempt(lambda: checked(libc.ptrace(0, 0, 0, 0)))
attempt(lambda: checked(libc.mount(b"none", b"/tmp", b"tmpfs", 0, b"")))
attempt(lambda: checked(libc.memfd_create(b"x", 0)))
attempt(lambda: checked(libc.syscall(425, 1, ctypes.create_string_buffer(256))))
attempt(lambda: checked(libc.setuid(0)) if os.getuid() else open("/none"))
"""
_MEMORY = """
attempt(lambda: bytearray(600 << 20))
"""
_MEMORY_OF_ALL = """
import time
ready, report = os.pipe()
for _ in range(4):
    if os.fork() == 0:
        kept = b"x" * (200 << 20)
        os.write(report, b"x")
        time.sleep(60)
for _ in range(4):
    os.read(ready, 1)
time.sleep(0.5)
print("open")
raise SystemExit
"""
_NO_FORK = """
def fork():
    if os.fork() == 0:
        os._exit(0)
attempt(fork)
"""
_FORK_BOMB = """
import time
count = 0
for _ in range(400):
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        count += 1
    except OSError:
        break
if count > 100:
    print("open")
    raise SystemExit
"""
_TIME = """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
"""
_DAEMON = """
import time
if os.fork() == 0:
    try:
        os.setsid()
    except OSError:
        pass
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
"""
_DISK = """
def fill():
    for index in range(20):
        with open(f"part{index}", "wb") as file:
            file.write(bytes(12 << 20))
attempt(fill)
attempt(lambda: open("/dev/shm/x", "wb").write(bytes(12 << 20)))
"""
_OUTPUT = """
while True:
    sys.stdout.write("x" * 65536)
"""

_WITH_CHILDREN = Limits(timeout_s=1.0, allow_subprocess=True, num_processes=48)
PROBES = (
    Probe(name="read files", what="the host's files and home folders cannot be read", program=_FILES_READ),
    Probe(
        name="write files",
        what="nothing outside of the scratch folder can be written",
        program=_FILES_WRITE,
        judge=lambda run, host: os.listdir(host.folder) == [os.path.basename(host.secret)],
    ),
    Probe(name="environment", what="no variable of the trainer is seen", program=_ENVIRONMENT),
    Probe(name="tcp", what="no connection to the host", program=_TCP),
    Probe(name="unix sockets", what="no abstract unix socket of the host", program=_UNIX),
    Probe(name="processes", what="other processes cannot be seen, signalled or slowed", program=_PROCESSES),
    Probe(name="kernel", what="no namespaces, ptrace, mounts, memfd, io_uring, root", program=_KERNEL),
    Probe(
        name="memory",
        what="an allocation above the limit fails",
        program=_MEMORY,
        limits=Limits(timeout_s=10.0, memory_mib=256),
    ),
    Probe(name="no fork", what="no process can be started unless allowed", program=_NO_FORK),
    Probe(
        name="fork bomb",
        what="where allowed, their number is limited",
        program=_FORK_BOMB,
        is_required=False,
        limits=_WITH_CHILDREN,
    ),
    Probe(
        name="memory of all",
        what="where allowed, they hold at most twice the limit together",
        program=_MEMORY_OF_ALL,
        is_required=False,
        limits=Limits(timeout_s=10.0, memory_mib=256, allow_subprocess=True),
        judge=lambda run, host: run.stopped_by == MEMORY,
    ),
    Probe(
        name="time",
        what="a loop that ignores all signals ends at the deadline",
        program=_TIME,
        limits=Limits(timeout_s=_SHORT_S),
        judge=lambda run, host: run.stopped_by == "deadline" and run.end.status == -9,
    ),
    Probe(
        name="left behind",
        what="a daemon dies with its job",
        program=_DAEMON,
        limits=_WITH_CHILDREN,
        judge=lambda run, host: not run.has_survivors,
    ),
    Probe(name="disk", what="the scratch folder is bounded as a whole", program=_DISK, is_required=False),
    Probe(
        name="output",
        what="endless output is cut",
        program=_OUTPUT,
        judge=lambda run, host: run.stopped_by == "output limit",
    ),
)


def probe_backend(kind: str) -> Report:
    """Start a zygote of the kind and run every probe in it."""
    start = time.monotonic()
    results: list[ProbeResult] = []
    why_not = ""
    try:
        with _host() as host, Sandbox(kind) as sandbox:
            for probe in PROBES:
                results.append(_result(sandbox, probe, host.value))
    except (SandboxError, OSError) as error:
        why_not = str(error)
    return Report(kind=kind, results=results, why_not=why_not, seconds=time.monotonic() - start)


def _result(sandbox: Sandbox, probe: Probe, host: Host) -> ProbeResult:
    program = _HEADER + probe.program + _FOOTER
    run = run_script(sandbox, program, arguments=host.arguments, limits=probe.limits)
    if probe.judge is not None:
        is_contained = probe.judge(run, host) and not run.output.startswith(_OPEN.encode())
    else:
        is_contained = run.output.strip() == _CONTAINED.encode()
    said = (run.stopped_by or run.errors.decode(errors="replace").strip()[-120:]) if not is_contained else ""
    return ProbeResult(name=probe.name, is_contained=is_contained, note=said)


class _host:
    """The targets, while the probes run."""

    def __enter__(self) -> _host:
        self._folder = tempfile.TemporaryDirectory(prefix="rlbench-probe-")
        os.chmod(self._folder.name, 0o777)
        secret = Path(self._folder.name) / "secret"
        secret.write_text("a file of the host")
        secret.chmod(0o666)
        self._tcp = socket.create_server(("127.0.0.1", 0))
        self._unix = socket.socket(socket.AF_UNIX)
        name = f"rlbench-probe-{os.getpid()}-{time.monotonic_ns()}"
        self._unix.bind("\0" + name)
        self._unix.listen()
        port = self._tcp.getsockname()[1]
        self.value = Host(folder=self._folder.name, secret=str(secret), port=port, abstract_name=name)
        return self

    def __exit__(self, *_: object) -> None:
        self._tcp.close()
        self._unix.close()
        self._folder.cleanup()
