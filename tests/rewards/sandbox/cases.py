"""One program, the row it is graded on, and the value it must get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

ADD = {"test_list": ["assert add(2, 3) == 5", "assert add(-1, 1) == 0", "assert add(10, 20) == 30"]}
ADD_CHECK = {
    "entry_point": "add",
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "test": "def check(candidate):\n    for a in range(3):\n        assert candidate(a, 7) == a + 7\n",
}
ADD_CALLS = {"entry_point": "add", "tests": [{"args": [2, 3], "expected": 5}, {"args": [-1, 1], "expected": 0}]}
SUM_LINE = {"tests": [{"input": "2 3\n", "output": "5\n"}, {"input": "10 20\n", "output": "30\n"}]}
OPEN = {"tests": [{"input": "", "output": "open\n"}]}  # passed only by a program that got out and says so


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`value` is what an honest grader gives: 0.0 for an attack, 1.0 for an honest program."""

    name: str
    category: str
    code: str
    row: Mapping[str, Any] = field(default_factory=lambda: ADD)
    value: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)  # of CodeTests
    may_pass_without: str = ""  # a probe of the sandbox: where it is open, this attack is known to get through

    @property
    def is_slow(self) -> bool:
        """It runs until it is stopped: tried with every backend only where being stopped is the point."""
        return "timeout_s" in self.options and self.category not in ("time", "processes")

    @property
    def completion(self) -> str:
        return f"```python\n{self.code}\n```"


def attacks(
    category: str, programs: Mapping[str, str], row: Mapping[str, Any] = ADD, *, slow: Sequence[str] = (), **more: Any
) -> list[Case]:
    """One case a program, all against the same row; the slow ones run into their deadline, which is then short."""
    cases = [Case(name=name, category=category, code=code, row=row, **more) for name, code in programs.items()]
    return [replace(case, options={**case.options, "timeout_s": 0.5}) if case.name in slow else case for case in cases]
