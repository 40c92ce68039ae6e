"""Whether a completion's program passes the row's tests, run in a sandbox."""

from __future__ import annotations

import site
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rlbench_rewards.code_extraction import POLICIES, extract_program, suspicious_marks
from rlbench_rewards.code_outputs import MODES, outputs_equal
from rlbench_rewards.code_rows import CodeTask, InputCase, read_task
from rlbench_rewards.contract import RewardError, RewardOutput, RewardSample, UnitCase
from rlbench_rewards.sandbox.choice import choose_backend
from rlbench_rewards.sandbox.grading import BrokenTests, Verdict, grade_tests, run_script
from rlbench_rewards.sandbox.limits import Limits
from rlbench_rewards.sandbox.supervisor import Sandbox, SandboxError

SCORES = ("all", "fraction")
_GOLD_COLUMNS = ("canonical_solution", "code", "solution")  # of HumanEval, MBPP, KodCode
_MAX_SHOWN = 200
_MAX_PROGRAM_CHARS = 500_000
_DOUBLE = {"entry_point": "double", "tests": [{"args": [2], "expected": 4}, {"args": ["a"], "expected": "aa"}]}
_ECHO = {"tests": [{"input": "3 4\n", "output": "4 3\n"}]}


class CodeTests:
    """1.0 if the program in the completion passes all tests of the row, else 0.0 (or the fraction passed).

    The program runs in one confined process, the tests in another; only builtin values cross. What was not seen to
    pass has failed: a deadline, a crash and an early exit are 0.0. A sandbox or a test that does not work is an error.

    Args:
        score: "all" or "fraction" of the tests, visible and hidden together.
        block: which fenced block is the program: "last", "first" or "longest".
        compare: how a program's output is compared: "tokens", "lines" or "exact".
        float_tolerance: of expected numbers, relative and (below 1) absolute.
        timeout_s: of one run: a program on one input, or all tests of a function together.
        total_timeout_s: of all runs of one completion. Keep it below `rewards.timeout_s`, which would otherwise turn
            an endless program from 0.0 into a completion without a reward.
        memory_mib: of the program.
        allow_subprocess: let the program start processes (threads are always allowed).
        use_site_packages: let the program import what is installed beside rlbench, e.g. numpy.
        backend: "auto" takes the strongest that works; or one of `sandbox.backends.KINDS`.
        i_understand: True to allow backend "unsafe_subprocess", which isolates nothing.

    Raises:
        ValueError: an unknown choice, or no isolation works here.
    """

    needs_right_answer = True

    def __init__(
        self,
        *,
        score: str = "all",
        block: str = "last",
        compare: str = "tokens",
        float_tolerance: float = 0.0,
        timeout_s: float = 6.0,
        total_timeout_s: float = 20.0,
        memory_mib: int = 1024,
        allow_subprocess: bool = False,
        use_site_packages: bool = False,
        backend: str = "auto",
        i_understand: bool = False,
    ) -> None:
        for name, value, choices in (("score", score, SCORES), ("block", block, POLICIES), ("compare", compare, MODES)):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}, expected one of: {', '.join(choices)}")
        if total_timeout_s < timeout_s:
            raise ValueError(f"total_timeout_s is {total_timeout_s}, expected at least timeout_s, {timeout_s}")
        self._score, self._block, self._compare, self._tolerance = score, block, compare, float_tolerance
        self._total_timeout_s = total_timeout_s
        self._limits = Limits(timeout_s=timeout_s, memory_mib=memory_mib, allow_subprocess=allow_subprocess)
        self.backend = choose_backend(backend, i_understand=i_understand)
        self.note = f"programs run in the sandbox backend {self.backend}"
        self._sandbox = Sandbox(self.backend, package_folders=site.getsitepackages() if use_site_packages else ())

    def __call__(self, sample: RewardSample) -> RewardOutput:
        task = read_task(sample.columns)
        program = extract_program(sample.completion, self._block)
        if program is None:
            return RewardOutput(value=0.0, details={"reason": "no program in the completion"})
        if len(program) > _MAX_PROGRAM_CHARS:
            return RewardOutput(value=0.0, details={"reason": f"a program of over {_MAX_PROGRAM_CHARS} characters"})
        verdicts = self._verdicts_with_retry(task, _joined(task, program))
        num_passed = sum(verdict.passed for verdict in verdicts)
        details = self._details(task, program, verdicts)
        if num_passed == len(verdicts):
            return RewardOutput(value=1.0, details=details)
        return RewardOutput(value=num_passed / len(verdicts) if self._score == "fraction" else 0.0, details=details)

    def gold_completion(self, sample: RewardSample) -> str | None:
        """The row's own solution; None where it has none, as in LiveCodeBench."""
        found = (sample.columns.get(name) for name in _GOLD_COLUMNS)
        program = next((text for text in found if isinstance(text, str) and text.strip()), None)
        return None if program is None else f"```python\n{program}\n```"

    def unit_cases(self) -> list[UnitCase]:
        cases = [
            ("def double(x):\n    return 2 * x", _DOUBLE, 1.0),
            ("def double(x):\n    return 3 * x", _DOUBLE, 0.0),
            ("import sys\nsys.exit(0)", _DOUBLE, 0.0),
            ("def double(x:", _DOUBLE, 0.0),
            ("print(*reversed(input().split()))", _ECHO, 1.0),
            ("print('4 4')", _ECHO, 0.0),
        ]
        empty = UnitCase(completion="", expected=0.0, columns=_DOUBLE)
        return [empty] + [UnitCase(completion=f"```python\n{p}\n```", expected=v, columns=row) for p, row, v in cases]

    def close(self) -> None:
        """End the sandbox. The end of the process does it as well."""
        self._sandbox.close()

    def _verdicts_with_retry(self, task: CodeTask, program: str) -> list[Verdict]:
        try:
            return self._verdicts(task, program)
        except BrokenTests as error:
            raise RewardError(f"the row's tests do not work: {error}") from error
        except SandboxError:
            pass  # a zygote that died is replaced once
        try:
            return self._verdicts(task, program)
        except SandboxError as error:
            raise RewardError(f"the sandbox does not work: {error}") from error

    def _verdicts(self, task: CodeTask, program: str) -> list[Verdict]:
        tests = [*task.visible, *task.hidden]
        if task.is_program:
            return self._verdicts_of_program(program, [test for test in tests if isinstance(test, InputCase)])
        return grade_tests(
            self._sandbox,
            program,
            [test for test in tests if not isinstance(test, InputCase)],
            setup=task.setup,
            entry_point=task.entry_point,
            float_tolerance=self._tolerance,
            limits=self._limits,
        )

    def _verdicts_of_program(self, program: str, cases: Sequence[InputCase]) -> list[Verdict]:
        deadline = time.monotonic() + self._total_timeout_s
        verdicts = []
        for case in cases:
            remaining_s = min(self._limits.timeout_s, deadline - time.monotonic())
            if remaining_s <= 0:
                verdicts.append(Verdict(passed=False, message="the time is up"))
                continue
            verdicts.append(self._verdict_of_case(program, case, remaining_s))
        return verdicts

    def _verdict_of_case(self, program: str, case: InputCase, timeout_s: float) -> Verdict:
        room_kib = max(1024, 2 * len(case.output) // 1024 + 64)
        limits = Limits(
            timeout_s=timeout_s,
            memory_mib=self._limits.memory_mib,
            output_kib=room_kib,
            allow_subprocess=self._limits.allow_subprocess,
        )
        run = run_script(self._sandbox, program, case.input, limits=limits)
        if run.stopped_by:
            return Verdict(passed=False, message=f"stopped by the {run.stopped_by}")
        output = run.output.decode("utf-8", "replace")
        if outputs_equal(output, case.output, self._compare, self._tolerance):
            return Verdict(passed=True)
        errors = run.errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
        return Verdict(passed=False, message=errors if run.end.status else "the output differs")

    def _details(self, task: CodeTask, program: str, verdicts: Sequence[Verdict]) -> Mapping[str, Any]:
        """Visible and hidden tests apart: a policy that passes the first and not the second games its tests."""
        num_visible = len(task.visible)
        visible, hidden = (_frac_passed(part) for part in (verdicts[:num_visible], verdicts[num_visible:]))
        failures = [f"test {index}: {verdict.message}" for index, verdict in enumerate(verdicts) if not verdict.passed]
        return {
            "sandbox": self.backend,
            "num_tests": len(verdicts),
            "num_passed": sum(verdict.passed for verdict in verdicts),
            "visible_pass_frac": visible,
            "hidden_pass_frac": hidden,
            "visible_hidden_gap": None if visible is None or hidden is None else visible - hidden,
            "first_failure": failures[0][:_MAX_SHOWN] if failures else "",
            "suspicious": suspicious_marks(program),
        }


def _frac_passed(verdicts: Sequence[Verdict]) -> float | None:
    return sum(verdict.passed for verdict in verdicts) / len(verdicts) if verdicts else None


def _joined(task: CodeTask, program: str) -> str:
    """The prompt's code and the completion's: one goes on from the other, or repeats it as a whole."""
    if not task.prefix:
        return program
    is_whole = f"def {task.entry_point}" in program
    return f"{task.prefix}\n\n{program}" if is_whole else task.prefix + program
