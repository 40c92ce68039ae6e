"""What the whole-step benchmark asks of every implementation: the same lengths, and no other end."""

import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_grpo

    yield bench_grpo
    for name in ("bench_grpo", "bench_step", "random_models"):
        sys.modules.pop(name, None)


@dataclass
class Params:
    """Of vLLM's what is read."""

    max_tokens: int = 2048
    n: int = 1
    ignore_eos: bool = False
    stop: list[str] = field(default_factory=lambda: ["\n"])
    stop_token_ids: list[int] = field(default_factory=lambda: [1])

    def clone(self):
        return replace(self)


def test_the_lengths_have_the_mean_and_the_cap(bench):
    lengths = bench.drawn_lengths(256)

    assert statistics.fmean(lengths) == pytest.approx(800, abs=1) and max(lengths) == 2048 and min(lengths) >= 1
    assert statistics.median(lengths) < 760 and lengths == bench.drawn_lengths(256)


def test_each_step_has_every_length_once_in_another_order(bench):
    given = Params()
    forced = bench.ForcedLengths([5, 6, 7, 8], 2048)
    steps = [[forced(given).max_tokens for _ in range(4)] for _ in range(3)]

    assert all(sorted(step) == [5, 6, 7, 8] for step in steps)
    assert steps[0] != steps[1] or steps[1] != steps[2]
    assert given == Params()
    one = forced(given)
    assert one.ignore_eos and one.stop == [] and one.stop_token_ids == []


def test_what_is_no_rollout_keeps_its_length_and_several_completions_are_refused(bench):
    forced = bench.ForcedLengths([5], 2048)

    assert forced(Params(max_tokens=1)) == Params(max_tokens=1)
    with pytest.raises(RuntimeError, match="a request for 4 completions"):
        forced(Params(n=4))
