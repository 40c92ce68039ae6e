"""A data row becomes a task: its tests, visible and hidden, whatever the data set calls its columns.

| columns | data sets |
|---|---|
| `test` and `entry_point`, `prompt` with the signature | HumanEval, HumanEval+ |
| `test_list`, `test_imports` or `test_setup_code`, `challenge_test_list` | MBPP, MBPP+ |
| `public_test_cases`, `private_test_cases`, `metadata` | LiveCodeBench |
| `input_output` with `inputs`, `outputs`, `fn_name` | APPS, TACO, CodeContests as prepared for training |
| `test` alone, with `def test_...` functions | KodCode |
| `tests`, `hidden_tests`, `setup`, `entry_point` | your own: asserts, or {"input", "output"}, or {"args", "expected"} |
"""

from __future__ import annotations

import ast
import base64
import binascii
import io
import json
import pickle
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlbench_rewards.contract import RewardError

_MAX_PACKED_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class InputCase:
    """What a program reads and must print."""

    input: str
    output: str


Test = InputCase | Mapping[str, Any]  # the mapping is a test of `sandbox.grading.grade_tests`


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeTask:
    """The tests of one row."""

    visible: Sequence[Test]
    hidden: Sequence[Test] = field(default_factory=list)
    setup: str = ""  # trusted code that the tests may use
    entry_point: str = ""
    prefix: str = ""  # code that the prompt gave and the completion goes on from, or repeats

    @property
    def is_program(self) -> bool:
        """Whether the tests are inputs of a whole program, not calls of its functions."""
        return isinstance((*self.visible, *self.hidden)[0], InputCase)


def read_task(columns: Mapping[str, Any]) -> CodeTask:
    """The tests of a row.

    Raises:
        RewardError: no tests, or tests in no known form.
    """
    try:
        task = _read(columns)
    except (ValueError, KeyError, TypeError, IndexError, binascii.Error, zlib.error) as error:
        raise RewardError(f"the row's tests cannot be read ({type(error).__name__}: {error})") from error
    tests = (*task.visible, *task.hidden)
    if not tests:
        raise RewardError(f"the row has no tests, it has the columns {', '.join(columns)}")
    if len({isinstance(test, InputCase) for test in tests}) > 1:
        raise RewardError("the row mixes inputs of a program with tests of functions")
    if not task.is_program and not task.entry_point and any("code" not in test for test in tests):  # type: ignore[operator]
        raise RewardError("the row's tests call a function but no column names it, expected entry_point")
    return task


def _read(columns: Mapping[str, Any]) -> CodeTask:
    if "public_test_cases" in columns or "private_test_cases" in columns:
        return _live_code_bench(columns)
    if columns.get("input_output"):
        return _apps(columns)
    if columns.get("test_list") is not None:
        return _mbpp(columns)
    if isinstance(columns.get("test"), str):
        return _human_eval(columns)
    entry_point = str(columns.get("entry_point") or "")
    visible, hidden = (_own_tests(columns.get(name)) for name in ("tests", "hidden_tests"))
    return CodeTask(visible=visible, hidden=hidden, setup=str(columns.get("setup") or ""), entry_point=entry_point)


def _human_eval(columns: Mapping[str, Any]) -> CodeTask:
    entry_point = str(columns.get("entry_point") or "")
    prompt = columns.get("prompt")
    prefix = prompt if isinstance(prompt, str) and entry_point and f"def {entry_point}" in prompt else ""
    return CodeTask(
        visible=[{"code": columns["test"]}],
        hidden=_own_tests(columns.get("hidden_tests")),
        setup=prefix if _is_python(prefix) else "",
        entry_point=entry_point,
        prefix=prefix,
    )


def _mbpp(columns: Mapping[str, Any]) -> CodeTask:
    imports = columns.get("test_imports") or []
    setup = "\n".join([*imports, str(columns.get("test_setup_code") or "")])
    hidden = [{"code": test} for test in columns.get("challenge_test_list") or []]
    if isinstance(columns.get("test"), str):
        hidden.append({"code": columns["test"]})
    entry_point = str(columns.get("entry_point") or "")
    hidden += _own_tests(columns.get("hidden_tests"))
    return CodeTask(
        visible=[{"code": test} for test in columns["test_list"]], hidden=hidden, setup=setup, entry_point=entry_point
    )


def _live_code_bench(columns: Mapping[str, Any]) -> CodeTask:
    metadata = _from_json(columns.get("metadata") or {})
    function = str(metadata.get("func_name") or "")
    visible, hidden = (
        [_live_code_bench_test(case) for case in _unpacked(columns.get(name) or [])]
        for name in ("public_test_cases", "private_test_cases")
    )
    return CodeTask(visible=visible, hidden=hidden, entry_point=function)


def _live_code_bench_test(case: Mapping[str, Any]) -> Test:
    if case.get("testtype") != "functional":
        return InputCase(input=case["input"], output=case["output"])
    arguments = [json.loads(line) for line in case["input"].split("\n") if line.strip()]
    return _call_test(arguments, json.loads(case["output"]))


def _apps(columns: Mapping[str, Any]) -> CodeTask:
    cases = _from_json(columns["input_output"])
    pairs = list(zip(cases["inputs"], cases["outputs"], strict=True))
    function = str(cases.get("fn_name") or "")
    hidden = _own_tests(columns.get("hidden_tests"))
    if function:
        tests = [_call_test(list(arguments), output, may_be_wrapped=True) for arguments, output in pairs]
        return CodeTask(visible=tests, hidden=hidden, entry_point=function)
    programs = [InputCase(input=_lines(given), output=_lines(output)) for given, output in pairs]
    return CodeTask(visible=programs, hidden=hidden)


def _own_tests(value: Any) -> list[Test]:
    tests: list[Test] = []
    for test in _from_json(value or []):
        if isinstance(test, str):
            tests.append({"code": test})
        elif "output" in test:
            tests.append(InputCase(input=_lines(test.get("input") or ""), output=_lines(test["output"])))
        else:
            tests.append(_call_test(list(test["args"]), test["expected"], kwargs=test.get("kwargs") or {}))
    return tests


def _call_test(
    arguments: list[Any], expected: Any, *, kwargs: Mapping[str, Any] | None = None, may_be_wrapped: bool = False
) -> dict[str, Any]:
    """`may_be_wrapped`: APPS writes some expected values as a list of one."""
    return {"args": arguments, "kwargs": dict(kwargs or {}), "expected": expected, "may_be_wrapped": may_be_wrapped}


def _lines(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value))


def _from_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _unpacked(value: Any) -> Any:
    """LiveCodeBench's private cases are base64 of zlib of a pickled JSON text."""
    if not isinstance(value, str) or value.lstrip().startswith(("[", "{")):
        return _from_json(value)
    unzipped = zlib.decompressobj()
    data = unzipped.decompress(base64.b64decode(value, validate=True), _MAX_PACKED_BYTES)
    return json.loads(_TextOnly(io.BytesIO(data)).load())


class _TextOnly(pickle.Unpickler):
    """Loads texts and numbers; names of classes and functions are refused, so nothing of the data can run."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise ValueError(f"the packed tests name {module_name}.{global_name}, expected plain text")


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return True
