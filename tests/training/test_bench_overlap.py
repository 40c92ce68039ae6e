"""The benchmark of training beside sampling counts what ran beside it, and what that saved."""

import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    before = set(sys.modules)
    import bench_overlap

    yield bench_overlap
    for name in set(sys.modules) - before:
        if name.startswith("bench_") or name == "random_models":
            sys.modules.pop(name)


def test_what_waits_in_both_threads_is_hidden(bench):
    interval_s = sys.getswitchinterval()
    found = bench.together(lambda: time.sleep(0.6), lambda: time.sleep(0.1), 1e-3)

    assert 2 <= found.num_microbatches <= 7
    assert 0.6 <= found.sampling_s <= found.all_s
    assert found.saved(0.6, 0.1) == pytest.approx(1 - found.all_s / (0.6 + 0.1 * found.num_microbatches))
    assert sys.getswitchinterval() == interval_s


def test_nothing_is_saved_where_one_holds_the_other_up(bench):
    assert bench.Together(sampling_s=3.0, all_s=4.0, num_microbatches=2).saved(2.0, 1.0) == 0.0
    assert bench.Together(sampling_s=3.0, all_s=5.0, num_microbatches=2).saved(2.0, 1.0) == -0.25


def test_an_error_of_training_is_raised_and_ends_it(bench):
    def fail() -> None:
        raise ValueError("no memory")

    with pytest.raises(RuntimeError, match="training beside sampling failed"):
        bench.together(lambda: time.sleep(0.1), fail, 1e-3)
