"""What the benchmark of contexts concludes from peaks, by hand; a length that breaks off costs none of those before."""

import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_context

    yield bench_context
    for name in ("bench_context", "bench_step", "bench_workers", "random_models"):
        sys.modules.pop(name, None)


def test_the_longest_is_where_the_line_through_the_two_longest_meets_the_limit(bench):
    # 1/8 MiB a token from 2,000 tokens on, where it is 1,250 MiB; the first point lies 50 MiB above the line
    rows = bench.longest_rows("ours", {1000: 1175.0, 3000: 1375.0, 2000: 1250.0}, [3.0])

    found = {row["metric"]: row["value"] for row in rows}
    assert found["peak a token more"] == 128  # KiB
    assert found["line / peak at 1000 - 1"] == pytest.approx(1125 / 1175 - 1)
    assert found["longest completion in 3 GiB, by the line"] == 3000 + (2048 - 1375) * 8  # 1 GiB is CUDA's own
    assert bench.longest_rows("ours", {1000: 1175.0}, [3.0]) == []


def test_a_length_that_breaks_off_leaves_those_before_it(bench, tmp_path, monkeypatch):
    def run_case(case, impl, timeout_s, *options):
        if case.startswith("one@3:"):
            raise KeyboardInterrupt
        return [{"case": case, "impl": impl, "metric": "peak", "value": 100.0 * int(case[4]), "unit": "MiB"}]

    monkeypatch.setattr(bench.bench_step, "run_case", run_case)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: None)
    out = tmp_path / "context.json"
    arguments = ["--lengths", "1,2,3", "--impls", "ours", "--output", str(out), "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["bench_context.py", *arguments])

    with pytest.raises(KeyboardInterrupt):
        bench.main()

    rows = json.loads(out.read_text())["rows"]
    assert [row["value"] for row in rows if row["metric"] == "peak"] == [100.0, 200.0]
    assert any(row["metric"].startswith("longest") for row in rows)
