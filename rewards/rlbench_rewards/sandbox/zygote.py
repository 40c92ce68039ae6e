"""The trusted process that jobs are forked from, warm. It never sees model-written code.

Control frames: the supervisor sends the profile first, then {"fork": n} or {"end": n}; the zygote answers
{"ready": text}, {"forked": n} with a socket to the new job, and {"ended": n, "status", "cpu_s", "memory_bytes"}.
The end of the control stream ends the zygote, and with it every job.
"""

from __future__ import annotations

import _signal
import _socket
import gc
import os
import select

# candidate and tester too: a job, whose /tmp is its own, could not import them from a project that lies there
from rlbench_rewards.sandbox import candidate, job, tester  # noqa: F401
from rlbench_rewards.sandbox.codec import decode, encode
from rlbench_rewards.sandbox.frames import ChannelClosed, receive_frame, send_frame
from rlbench_rewards.sandbox.jails import JAILS

_IDLE_MS = 10
_SIGINT = 2


def main(control_descriptor: int) -> None:
    _signal.signal(_SIGINT, _signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends us
    control = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, control_descriptor)
    profile = decode(receive_frame(control))
    jail = JAILS[profile["kind"]](profile)
    os.umask(0o022)
    try:
        jail.enter()
    except OSError as error:
        send_frame(control, encode({"failed": str(error)}))
        return
    send_frame(control, encode({"ready": True}))
    try:
        Zygote(control, jail, profile).serve()
    except ChannelClosed:
        return


class Zygote:
    def __init__(self, control: _socket.socket, jail, profile: dict) -> None:
        self._control = control
        self._jail = jail
        self._profile = profile
        self._preload = list(reversed(profile["preload"]))
        self._pids: dict[int, int] = {}  # of the jobs, by number
        gc.disable()

    def serve(self) -> None:
        try:
            self._serve()
        finally:
            for number in list(self._pids):
                self._end(number)
            self._jail.leave()

    def _serve(self) -> None:
        waiting = select.poll()
        waiting.register(self._control, select.POLLIN)
        while True:
            if self._preload and not waiting.poll(_IDLE_MS):
                self._import_one()
                continue
            request = decode(receive_frame(self._control))
            if "fork" in request:
                self._fork(request["fork"])
            else:
                send_frame(self._control, encode(self._end(request["end"])))

    def _fork(self, number: int) -> None:
        supervisor_end, job_end = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        supervisor_end.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)  # tells the supervisor the job's pid
        pid = self._jail.fork()
        if pid == 0:
            try:
                job.run(job_end.fileno(), self._jail, self._profile)
            finally:
                os._exit(70)
        self._pids[number] = pid
        job_end.close()
        send_frame(self._control, encode({"forked": number}), (supervisor_end.fileno(),))
        supervisor_end.close()

    def _end(self, number: int) -> dict:
        """Kill the job with all it started, take its status, leave nothing behind."""
        pid = self._pids.pop(number, 0)
        if not pid:
            return {"ended": number, "status": 0, "cpu_s": 0.0, "memory_bytes": 0}
        self._jail.kill(pid)
        _, status, usage = os.wait4(pid, 0)
        self._jail.clean_up(pid)
        return {
            "ended": number,
            "status": os.waitstatus_to_exitcode(status),
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "memory_bytes": usage.ru_maxrss * 1024,
        }

    def _import_one(self) -> None:
        """What many programs import is loaded once, here, while nobody waits."""
        name = self._preload.pop()
        try:
            __import__(name)
        except ImportError:
            return
        if not self._preload:
            gc.collect()
            gc.freeze()
