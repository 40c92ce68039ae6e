"""Grade a program in a sandbox: against tests in a second interpreter, or against expected output."""

from __future__ import annotations

import os
import select
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlbench_rewards.sandbox.codec import CodecError, decode, encode
from rlbench_rewards.sandbox.frames import ChannelClosed, send_frames
from rlbench_rewards.sandbox.limits import Limits
from rlbench_rewards.sandbox.supervisor import (
    START_DEADLINE_S,
    DeadlinePassed,
    Job,
    JobEnd,
    Sandbox,
    SandboxError,
    receive_before,
)

_KEPT_ERROR_BYTES = 2000
_POLL_MS = 1000
_TESTER_MEMORY_MIB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether one test passed, as observed; what was not observed did not pass."""

    passed: bool
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptRun:
    """What a program did on one input."""

    output: bytes
    errors: bytes
    end: JobEnd
    stopped_by: str = ""  # "deadline", "output limit" or what a TreeWatch exceeded; "" if it ended by itself
    has_survivors: bool = False  # something still holds its output after the end: the backend does not kill all


class BrokenTests(SandboxError):
    """The row's own tests do not work."""


def grade_tests(
    sandbox: Sandbox,
    code: str,
    tests: Sequence[Mapping[str, Any]],
    *,
    setup: str = "",
    entry_point: str = "",
    float_tolerance: float = 0.0,
    limits: Limits,
) -> list[Verdict]:
    """One verdict a test, in order. The program and the tests run in two jobs, joined by one socket.

    Args:
        sandbox: where both run.
        code: the program, model-written.
        tests: each {"code"} with asserts, or {"args", "kwargs", "expected", "may_be_wrapped"}, a call of entry_point.
        setup: trusted code of the row that the tests may use.
        entry_point: the function under test.
        float_tolerance: of expected values, relative and (below 1) absolute.
        limits: of the program; the deadline is that of all tests together.

    Raises:
        BrokenTests: the row's setup or tests do not work, whatever the program does.
        SandboxError: the sandbox did not work.
    """
    candidate = sandbox.take_job()
    try:
        tester = sandbox.take_job()
    except SandboxError:
        candidate.connection.close()
        raise
    try:
        spec = {"setup": setup, "entry_point": entry_point, "float_tolerance": float_tolerance}
        _start_pair(candidate, tester, code, {**spec, "num_tests": len(tests)}, limits)
        send_frames(tester.connection, [encode(dict(test)) for test in tests])
        with sandbox.watch(candidate, limits) as watch:
            verdicts = _observed_verdicts(sandbox, tester, len(tests), limits.timeout_s)
        if watch.exceeded:
            stopped = Verdict(passed=False, message=f"stopped by the {watch.exceeded}")
            verdicts = [verdict if verdict.passed else stopped for verdict in verdicts]
        if not all(verdict.passed for verdict in verdicts):
            sandbox.end(candidate)  # raises if the zygote is dead: then the program may have died with it
        return verdicts
    except (ChannelClosed, CodecError, TimeoutError) as error:
        raise SandboxError(f"the tester did not take its tests ({error or type(error).__name__})") from error
    finally:
        if sandbox.is_alive():
            sandbox.end(candidate, wait=False)
            sandbox.end(tester, wait=False)


def _start_pair(candidate: Job, tester: Job, code: str, spec: dict[str, Any], limits: Limits) -> None:
    tester_limits = Limits(timeout_s=limits.timeout_s, memory_mib=max(limits.memory_mib, _TESTER_MEMORY_MIB))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        tester.start({"mode": "tester", **spec, "limits": tester_limits.as_spec()}, [ours.fileno()])
        candidate.start({"mode": "candidate", "code": code, "limits": limits.as_spec()}, [theirs.fileno()])


def _observed_verdicts(sandbox: Sandbox, tester: Job, num_tests: int, timeout_s: float) -> list[Verdict]:
    """The clock of the program runs from the start of the tests: a slow machine is no fault of the program."""
    deadline = time.monotonic() + START_DEADLINE_S
    verdicts: dict[int, Verdict] = {}
    has_started, reason = False, "the time is up"
    try:
        while not has_started or len(verdicts) < num_tests:
            report = decode(receive_before(tester.connection, deadline))
            if "broken" in report:
                raise BrokenTests(report["broken"])
            if "started" in report:
                has_started = True
                deadline = time.monotonic() + timeout_s
            else:
                verdicts[report["index"]] = Verdict(passed=report["passed"] is True, message=report["message"])
    except (ChannelClosed, CodecError):
        reason = "the tests ended early"
        if not sandbox.is_alive():
            raise SandboxError("the zygote died under a job") from None
    except DeadlinePassed:
        pass
    if not has_started:
        raise SandboxError(f"the tests did not start ({reason})")
    missing = Verdict(passed=False, message=reason)
    return [verdicts.get(index, missing) for index in range(num_tests)]


def run_script(
    sandbox: Sandbox, code: str, stdin: str = "", *, arguments: Sequence[str] = (), limits: Limits
) -> ScriptRun:
    """Run a program on one input, in a process of its own.

    Raises:
        SandboxError: the sandbox did not work.
    """
    job = sandbox.take_job()
    spec = {"mode": "script", "code": code, "arguments": list(arguments), "limits": limits.as_spec()}
    output_end, output = os.pipe()
    errors_end, errors = os.pipe()
    try:
        try:
            with _file_of(stdin) as file:
                job.start(spec, [file.fileno(), output, errors])
        finally:
            os.close(output)
            os.close(errors)
        deadline = time.monotonic() + limits.timeout_s
        with sandbox.watch(job, limits) as watch:
            output_bytes, error_bytes, stopped_by = _collect(
                job, output_end, errors_end, deadline, limits.output_kib * 1024
            )
        stopped_by = watch.exceeded or stopped_by
        end = sandbox.end(job)
        has_survivors = any(_is_still_held(descriptor) for descriptor in (output_end, errors_end))
    finally:
        os.close(output_end)
        os.close(errors_end)
    if end is None:
        raise SandboxError("the zygote died under a job")
    return ScriptRun(
        output=output_bytes, errors=error_bytes, end=end, stopped_by=stopped_by, has_survivors=has_survivors
    )


def _is_still_held(descriptor: int) -> bool:
    """Whether some process can still write into the pipe."""
    while part := _read_available(descriptor):
        pass
    return part is None


def _file_of(text: str):
    """The input as a file: no writer has to keep up with the reader."""
    data = text.encode("utf-8", "surrogatepass")
    if hasattr(os, "memfd_create"):
        file = os.fdopen(os.memfd_create("stdin"), "w+b")
    else:
        file = tempfile.TemporaryFile()
    file.write(data)
    file.seek(0)
    return file


def _collect(job: Job, output: int, errors: int, deadline: float, limit: int) -> tuple[bytes, bytes, str]:
    """Read both streams until the job's own socket ends, the time is up or too much came."""
    kept = {output: bytearray(), errors: bytearray()}
    poll = select.poll()
    for descriptor in (output, errors):
        os.set_blocking(descriptor, False)
        poll.register(descriptor, select.POLLIN)
    poll.register(job.connection, select.POLLIN)
    stopped_by, has_ended, num_bytes = "", False, 0
    while not has_ended and not stopped_by:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            stopped_by = "deadline"
        for descriptor, _ in poll.poll(max(0.0, min(remaining * 1000, _POLL_MS))):
            if descriptor in kept:
                part = _read_available(descriptor)
                if part == b"":
                    poll.unregister(descriptor)
                kept[descriptor] += part or b""
                num_bytes += len(part or b"")
            else:
                has_ended = _has_ended(job)
        if num_bytes > limit:
            stopped_by = "output limit"
    for descriptor in kept if has_ended else ():
        while num_bytes <= limit and (part := _read_available(descriptor)):
            kept[descriptor] += part
            num_bytes += len(part)
        stopped_by = stopped_by or ("output limit" if num_bytes > limit else "")
    return bytes(kept[output]), bytes(kept[errors][-_KEPT_ERROR_BYTES:]), stopped_by


def _has_ended(job: Job) -> bool:
    """Whether the job's socket ended; a program may write into it, which nobody reads."""
    try:
        return job.connection.recv(4096) == b""
    except ConnectionResetError:
        return True


def _read_available(descriptor: int) -> bytes | None:
    """What is there; b"" at the end, None if nothing is there yet."""
    try:
        return os.read(descriptor, 2**16)
    except BlockingIOError:
        return None
