"""The part of `subprocess.Popen` that these tests use, for processes of the fork server."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from tests.loops.fork_server import STATUS

WITHOUT_THREADS = {  # that numpy and pyarrow start when they are imported
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


class ForkServer:
    """Started by its first process; `close` ends it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._connection: socket.socket | None = None

    def start(self, arguments: list[str], folder: Path, *, program: str = "", are_merged: bool = False):
        """`python -m rlbench`, or `python -c program`, with `arguments`; errors go to the standard output if merged."""
        if self._connection is None:
            self._connect()
        assert self._connection is not None
        request = {"program": program, "arguments": arguments, "folder": str(folder), "environment": self.environment}
        return ForkedProcess(self._connection, request, are_merged)

    def _connect(self) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.loops.fork_server", str(theirs.fileno())], pass_fds=[theirs.fileno()],
                env=self.environment | WITHOUT_THREADS, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._server.wait(timeout=60)
            self._connection = None


class ForkedProcess:
    """Text of both outputs, as with pipes of Popen; `stderr` is None where it is merged."""

    def __init__(self, server: socket.socket, request: dict, are_merged: bool) -> None:
        self.arguments = request["arguments"]
        self.returncode: int | None = None
        self.stderr = None
        output, their_output = os.pipe()
        self._status, their_status = os.pipe()
        self.stdout = os.fdopen(output)
        their_errors = their_output
        if not are_merged:
            errors, their_errors = os.pipe()
            self.stderr = os.fdopen(errors)
        theirs = [their_output, their_errors, their_status]
        socket.send_fds(server, [json.dumps(request).encode()], theirs)
        for descriptor in set(theirs):
            os.close(descriptor)
        self.pid = self._read_status(120)  # the first waits for the imports, on a busy machine

    def _read_status(self, timeout_s: float) -> int:
        if not select.select([self._status], [], [], timeout_s)[0]:
            raise subprocess.TimeoutExpired(self.arguments, timeout_s)
        data = os.read(self._status, STATUS.size)
        assert len(data) == STATUS.size, "the fork server has ended"
        return STATUS.unpack(data)[0]

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        if self.returncode is None:
            self.returncode = self._read_status(timeout)
            os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What is left of both outputs, "" for errors that are merged; kills the process after `timeout` seconds.

        Raises:
            subprocess.TimeoutExpired: as Popen's.
        """
        texts = ["", ""]

        def read(i: int, stream) -> None:
            with stream:
                texts[i] = stream.read()

        streams = [stream for stream in (self.stdout, self.stderr) if stream]
        readers = [threading.Thread(target=read, args=item, daemon=True) for item in enumerate(streams)]
        for reader in readers:
            reader.start()
        try:
            self.wait(timeout)
        finally:
            self.send_signal(signal.SIGKILL)
            for reader in readers:
                reader.join(timeout)
        if any(reader.is_alive() for reader in readers):  # a process that it started holds the output
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        return texts[0], texts[1]
