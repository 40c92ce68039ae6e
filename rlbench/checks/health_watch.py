"""Findings while a run goes on: each rule speaks once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlbench.checks.health import find_problems
from rlbench.checks.health_history import NOTE, Finding

EVERY_STEPS = 5  # in the first steps
_LOOKS = 50  # that a run of any length gets at least; at most twice as many after its first steps


def is_due(step: int) -> bool:
    """Whether to look after this step: rarer in a long run, as each look reads all steps (3,000: 0.12 s).

    Args:
        step: optimizer steps applied.
    """
    num_doublings = max(0, (step // (EVERY_STEPS * _LOOKS)).bit_length() - 1)
    return step % (EVERY_STEPS << num_doublings) == 0


class HealthWatch:
    """Judges the run's metrics so far, as its report will.

    Args:
        config: nested as in config.yaml.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._told: set[str] = set()

    def news(self, train: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """Problems and warnings of rules that had found nothing before; notes wait for the report.

        Args:
            train: the metrics of each step, in order.
            evaluations: of each evaluation, in order.
        """
        found = find_problems(train, evaluations, self._config)
        new = [finding for finding in found if finding.severity != NOTE and finding.rule not in self._told]
        self._told |= {finding.rule for finding in new}
        return new


def finding_line(finding: Finding) -> str:
    """A finding in one line: what, the numbers, the settings to change."""
    advice = "; ".join(f"{key}: {text}" for key, text in finding.settings.items())
    return f"{finding.title}: {finding.evidence}" + (f" (try {advice})" if advice else "")
