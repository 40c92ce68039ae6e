"""All cases, graded by one backend. `python -m tests.rewards.sandbox.attack_suite BACKEND` prints them as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence

from rlbench_rewards import RewardSample
from rlbench_rewards.code_tests import CodeTests
from rlbench_rewards.sandbox.choice import choose_backend
from tests.rewards.sandbox import attacks_on_host, attacks_on_verdict
from tests.rewards.sandbox.cases import Case
from tests.rewards.sandbox.honest_programs import HONEST, MUTANTS

DEADLINE_S = 5.0
# Those that must be over by the deadline + 1 s, whatever they do.
BOMBS = [
    *("fork bomb", "10 GiB at once", "10 GiB over children", "children of children that hold memory"),
    *("endless output", "endless errors", "sleeping children", "all signals ignored", "daemon"),
]
ALL = [*attacks_on_verdict.CASES, *attacks_on_host.CASES, *MUTANTS, *HONEST]


class Graders:
    """One CodeTests a set of options, kept warm."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._graders: dict[tuple, CodeTests] = {}

    def value(self, case: Case) -> float:
        return self.grade(case)[0]

    def grade(self, case: Case) -> tuple[float, float]:
        """The value, and how long it took in seconds."""
        options = {"timeout_s": DEADLINE_S, "memory_mib": 512, **case.options}
        key = tuple(sorted(options.items()))
        if key not in self._graders:
            self._graders[key] = CodeTests(backend=self.backend, **options)
        start = time.monotonic()
        sample = RewardSample(prompt="", completion=case.completion, columns=case.row)
        return self._graders[key](sample).value, time.monotonic() - start

    def is_over_in_time(self, case: Case) -> bool:
        """By the deadline + 1 s, graded 0; others may use this machine: one try of three in time is proof enough."""
        limit_s = case.options.get("timeout_s", DEADLINE_S) + 1.0
        tries = (self.grade(case) for _ in range(3))
        return any(value == 0.0 and seconds < limit_s for value, seconds in tries)

    def close(self) -> None:
        for grader in self._graders.values():
            grader.close()


def main(arguments: Sequence[str]) -> None:
    backend = choose_backend(arguments[0])
    graders = Graders(backend)
    values = {case.name: graders.value(case) for case in ALL if not case.is_slow}
    too_late = [case.name for case in ALL if case.name in BOMBS and not graders.is_over_in_time(case)]
    graders.close()
    print(json.dumps({"uid": os.geteuid(), "backend": backend, "values": values, "too_late": too_late}))


if __name__ == "__main__":
    main(sys.argv[1:])
