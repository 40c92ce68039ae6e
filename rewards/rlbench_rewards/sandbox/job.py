"""One job: the forked process confines itself, reads what to do, and does it. Runs model-written code after that.

The socket to the supervisor stays descriptor 3 of a script (its end is the job's end) and carries the verdicts of a
tester. A candidate keeps only its channel to the tester.
"""

from __future__ import annotations

import _signal
import _socket
import gc
import os
import resource
import sys

from rlbench_rewards.sandbox import seccomp, syscalls
from rlbench_rewards.sandbox.codec import decode, encode
from rlbench_rewards.sandbox.frames import receive_frame_with_descriptors, send_frame

_SUPERVISOR = 3
_SIGINT = 2
_SCRIPT_NAME = "solution.py"


def run(descriptor: int, jail, profile: dict) -> None:
    """Never returns."""
    os.dup2(descriptor, _SUPERVISOR, inheritable=False)
    os.closerange(_SUPERVISOR + 1, 4096)
    os.dup2(1, 2)  # 0 to 2 are /dev/null; the zygote's stderr is a file of the host
    supervisor = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, _SUPERVISOR)
    try:
        jail.confine()
    except OSError as error:
        send_frame(supervisor, encode({"failed": str(error)}))
        os._exit(70)
    send_frame(supervisor, encode({"ready": True}))
    frame, descriptors = receive_frame_with_descriptors(supervisor)
    spec = decode(frame)
    _set_limits(spec["limits"], profile["kind"])
    _signal.signal(_SIGINT, _signal.default_int_handler)
    sys.path += profile["package_folders"]
    gc.enable()
    _RUNNERS[spec["mode"]](spec, supervisor, descriptors)
    os._exit(0)


def _set_limits(limits: dict, kind: str) -> None:
    memory, cpu_s = limits["memory_bytes"], limits["cpu_s"]
    _limit(resource.RLIMIT_AS, memory)
    _limit(resource.RLIMIT_CPU, cpu_s, cpu_s + 1)
    _limit(resource.RLIMIT_FSIZE, limits["file_bytes"])
    _limit(resource.RLIMIT_NOFILE, limits["num_files"])
    _limit(resource.RLIMIT_NPROC, limits["num_processes"])
    _limit(resource.RLIMIT_CORE, 0)
    if kind != "unsafe_subprocess":
        syscalls.install_seccomp(seccomp.last_filter(allow_subprocess=limits["allow_subprocess"]))


def _limit(which: int, soft: int, hard: int | None = None) -> None:
    _, most = resource.getrlimit(which)
    wanted = soft if hard is None else hard
    ceiling = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(which, (min(soft, ceiling), ceiling))


def _run_script(spec: dict, supervisor: _socket.socket, descriptors: list[int]) -> None:
    """A whole program on stdin, stdout and stderr, as `python solution.py` would run it."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = [_SCRIPT_NAME, *spec["arguments"]]
    os._exit(_exit_status_of(spec["code"]))


def _exit_status_of(code: str) -> int:
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(code, _SCRIPT_NAME, "exec", dont_inherit=True), module.__dict__)
        status = 0
    except SystemExit as stop:
        status = _status_of_exit(stop.code)
    except BaseException as error:
        _print_error(error)
        status = 1
    return _finish(status)


def _status_of_exit(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def _print_error(error: BaseException) -> None:
    try:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    except BaseException:
        return  # an exception whose text raises has no text


def _finish(status: int) -> int:
    """What the interpreter does at its end: wait for threads, run exit handlers, write what is buffered."""
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        if "atexit" in sys.modules:
            sys.modules["atexit"]._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:
        _print_error(error)
        return status or 1
    return status


def _run_candidate(spec: dict, supervisor: _socket.socket, descriptors: list[int]) -> None:
    from rlbench_rewards.sandbox.candidate import serve

    supervisor.close()
    serve(_channel(descriptors), spec["code"])


def _run_tester(spec: dict, supervisor: _socket.socket, descriptors: list[int]) -> None:
    from rlbench_rewards.sandbox.tester import serve

    serve(supervisor, _channel(descriptors), spec)


def _channel(descriptors: list[int]) -> _socket.socket:
    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, descriptors[0])


_RUNNERS = {"script": _run_script, "candidate": _run_candidate, "tester": _run_tester}
