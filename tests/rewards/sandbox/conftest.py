"""The backends of this machine, probed once a session."""

from __future__ import annotations

import pytest

from rlbench_rewards.sandbox.backends import ISOLATED
from rlbench_rewards.sandbox.choice import format_reports
from rlbench_rewards.sandbox.probes import Report, probe_backend
from tests.rewards.sandbox.attack_suite import Graders


@pytest.fixture(scope="session")
def reports() -> dict[str, Report]:
    return {kind: probe_backend(kind) for kind in ISOLATED}


@pytest.fixture(scope="session")
def best(reports) -> str:
    """The strongest backend that isolates here."""
    good = [kind for kind in ISOLATED if reports[kind].is_good]
    if not good:
        pytest.skip(f"no backend isolates on this machine:\n{format_reports(list(reports.values()))}")
    return good[0]


@pytest.fixture(scope="session")
def graders(best):
    graders = Graders(best)
    yield graders
    graders.close()
