"""The process that runs the tests. It never loads model-written code; the candidate's values come as builtins.

Frames to the supervisor: {"started": True} or {"broken": why}, the row's own fault; then {"index", "passed",
"message"} for each test that ran to its end. What is not reported was not observed: it is failed.
"""

from __future__ import annotations

import _socket
import builtins
import os
import sys

from rlbench_rewards.sandbox.assertions import OBSERVE, Assertions, TestCode
from rlbench_rewards.sandbox.codec import decode, encode
from rlbench_rewards.sandbox.frames import receive_frame, send_frame
from rlbench_rewards.sandbox.proxies import Candidate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MAX_TEXT = 300


class BrokenTest(Exception):
    """The row's own code does not work, whatever the candidate does."""


def serve(supervisor: _socket.socket, channel: _socket.socket, spec: dict) -> None:
    """Run all tests and report each.

    `spec` has setup (trusted code of the row), entry_point, float_tolerance and num_tests; the tests follow, one a
    frame: {"code"} or {"args", "kwargs", "expected", "may_be_wrapped"}.
    """
    candidate = Candidate(channel)
    try:
        namespace: dict[str, Any] = {"__name__": "tests"}
        _run_setup(spec["setup"], namespace)
        tests = [_prepared(decode(receive_frame(supervisor))) for _ in range(spec["num_tests"])]
        send_frame(supervisor, encode({"started": True}))
        reason = candidate.wait_until_loaded()
        for index, test in enumerate(tests):
            passed, message = (False, reason) if reason else _outcome(test, candidate, namespace, spec)
            send_frame(supervisor, encode({"index": index, "passed": passed, "message": message[:_MAX_TEXT]}))
    except BrokenTest as error:
        send_frame(supervisor, encode({"broken": str(error)[:_MAX_TEXT]}))
    os._exit(0)


def _run_setup(setup: str, namespace: dict[str, Any]) -> None:
    try:
        exec(compile(setup, "setup.py", "exec", dont_inherit=True), namespace)
    except BaseException as error:
        raise BrokenTest(f"the setup of the tests raised {_text(error)}") from None


def _prepared(test: dict) -> TestCode | dict:
    if "code" not in test:
        return test
    try:
        return TestCode(test["code"])
    except SyntaxError as error:
        raise BrokenTest(f"a test is no Python: {error}") from None


def _outcome(test: TestCode | dict, candidate: Candidate, namespace: dict[str, Any], spec: dict) -> tuple[bool, str]:
    try:
        if isinstance(test, TestCode):
            return _outcome_of_code(test, candidate, namespace, spec["entry_point"])
        return _outcome_of_call(test, candidate, spec)
    except BrokenTest:
        raise
    except BaseException as error:
        if candidate.unsupported:
            raise BrokenTest(candidate.unsupported) from None
        if isinstance(error, ModuleNotFoundError) and error.name:
            raise BrokenTest(f"a test needs the module {error.name!r}, which the sandbox does not have") from None
        return False, _text(error)


def _outcome_of_code(test: TestCode, candidate: Candidate, setup: dict[str, Any], entry_point: str) -> tuple[bool, str]:
    assertions = Assertions(test.required)
    namespace = dict(setup)
    namespace[OBSERVE] = assertions.observe
    _bind_names(test, namespace, candidate, entry_point)
    exec(test.code, namespace)
    if "check" in namespace and not test.calls_check and entry_point:
        namespace["check"](candidate.name(entry_point))
    for name, value in list(namespace.items()):
        if name.startswith("test") and isinstance(value, type(_text)):
            value()
        elif isinstance(value, type) and "unittest" in sys.modules:
            _run_test_case(value)
    if candidate.unsupported:
        raise BrokenTest(candidate.unsupported)
    if assertions.num_failed:
        return False, f"{assertions.num_failed} assertions failed"
    if assertions.num_missed:
        return False, f"{assertions.num_missed} assertions were not reached"
    return True, ""


def _run_test_case(value: type) -> None:
    """All tests of a unittest.TestCase; the first failure is raised."""
    import unittest

    if not issubclass(value, unittest.TestCase):
        return
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(value).run(result)
    for _, trace in result.failures + result.errors:
        raise AssertionError(trace.strip().splitlines()[-1])


def _bind_names(test: TestCode, namespace: dict[str, Any], candidate: Candidate, entry_point: str) -> None:
    """What a test's free names mean: the entry point, the row's own setup, builtins, the standard library; only what
    is none of these may be the candidate's, so that it can redefine neither `all` nor `math`."""
    if entry_point:
        namespace[entry_point] = candidate.name(entry_point)
    for name in test.free_names:
        if name in namespace or hasattr(builtins, name):
            continue
        if name in test.module_names and name in sys.stdlib_module_names:
            namespace[name] = __import__(name)
        elif name in candidate.names:
            is_callable = candidate.names[name]
            namespace[name] = candidate.name(name) if is_callable else candidate.request("get", None, name)


def _outcome_of_call(test: dict, candidate: Candidate, spec: dict) -> tuple[bool, str]:
    result = candidate.request("call", None, spec["entry_point"], tuple(test["args"]), test["kwargs"])
    expected, tolerance = test["expected"], spec["float_tolerance"]
    if _is_equal(result, expected, tolerance):
        return True, ""
    if test["may_be_wrapped"] and type(expected) is list and len(expected) == 1:
        if _is_equal(result, expected[0], tolerance):
            return True, ""
    return False, "the result differs"


def _is_equal(result: Any, expected: Any, tolerance: float) -> bool:
    """Equality of builtins; a tuple equals a list (the expected value may come from JSON), floats within tolerance."""
    if isinstance(result, (list, tuple)) and isinstance(expected, (list, tuple)):
        pairs = zip(result, expected, strict=False)
        return len(result) == len(expected) and all(_is_equal(r, e, tolerance) for r, e in pairs)
    if isinstance(result, dict) and isinstance(expected, dict):
        if len(result) != len(expected):
            return False
        return all(key in result and _is_equal(result[key], value, tolerance) for key, value in expected.items())
    if tolerance and type(result) in (int, float) and type(expected) in (int, float):
        return result == expected or abs(result - expected) <= tolerance * max(1.0, abs(expected))
    return bool(result == expected)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
