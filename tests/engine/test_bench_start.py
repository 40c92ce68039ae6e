"""The look-out of the benchmark of vLLM's start counts what the main thread does, by stage and activity."""

import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_start

    yield bench_start
    for name in ("bench_start", "bench_workers"):
        sys.modules.pop(name, None)


def test_a_stack_is_named_by_its_innermost_stage_and_activity(bench):
    inductor, warm_up = ("/x/torch/_inductor/graph.py", "compile"), ("/x/gpu_worker.py", "compile_or_warm_up_model")
    graphs = ("/x/model_runner.py", "capture_model")

    assert bench.classify([inductor, warm_up]) == ("warm-up", "torch.compile")
    assert bench.classify([("/x/attn.py", "forward"), graphs, warm_up]) == ("graphs", "")
    assert bench.classify([("<frozen importlib>", "_find_and_load"), graphs]) == ("imports", "")
    assert bench.classify([("/x/llm.py", "__init__")]) == ("the rest", "")


def test_seconds_of_a_stage_are_those_that_it_took(bench):
    def kernel_warmup():
        time.sleep(0.4)

    with bench.Lookout() as lookout:
        kernel_warmup()
        time.sleep(0.2)

    named, unnamed = lookout.seconds["kernels' warm-up"], lookout.seconds["the rest"]
    assert 0.2 < named and 0.1 < unnamed < named
    assert sum(lookout.seconds.values()) == pytest.approx(sum(lookout.unnamed.values()) + named)
