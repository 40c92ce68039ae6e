"""Every engine keeps the contract of `rlbench.engine.interface`: each check, each engine."""

from collections.abc import Callable, Iterator

import pytest

pytest.register_assert_rewrite("tests.engine.contract", "tests.engine.contract_adapter")

from rlbench.engine.interface import BASE_FINGERPRINT, Engine  # noqa: E402
from tests.engine.contract import CHECKS, Subject, score_equals_a_plain_forward  # noqa: E402
from tests.engine.contract_adapter import ADAPTER_CHECKS  # noqa: E402
from tests.engine.factories import FACTORIES  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
ALL_CHECKS = [*CHECKS, *ADAPTER_CHECKS]


@pytest.fixture(scope="module", params=list(FACTORIES))
def subject(request, tiny) -> Iterator[Subject]:
    with FACTORIES[request.param](tiny) as subject:
        check_start(subject)
        yield subject


def check_start(subject: Subject) -> None:
    """An engine starts with the base alone; asserted before any check can sync an adapter."""
    assert isinstance(subject.engine, Engine)
    assert (subject.engine.policy_version, subject.engine.adapter_fingerprint) == (0, BASE_FINGERPRINT)
    score_equals_a_plain_forward(subject)


@pytest.mark.parametrize("check", ALL_CHECKS, ids=[check.__name__ for check in ALL_CHECKS])
def test_the_engine_keeps_the_contract(subject: Subject, check: Callable[[Subject], None]):
    check(subject)
