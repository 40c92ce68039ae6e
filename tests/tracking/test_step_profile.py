"""The profile of a block: files, and a table whose parts are the block's passes."""

import gzip
import json

import pytest
import torch

from rlbench.tracking.step_profile import component_table, components, profiled


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return torch.mm(values, values) * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@pytest.fixture
def recorded():
    values = torch.randn(300, 300, requires_grad=True)
    optimizer = torch.optim.SGD([values], lr=0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        for _ in range(3):
            Doubled.apply(values).sum().backward()
        optimizer.step()
    return found.events()


def test_components_are_the_functions_of_each_pass(recorded):
    found = {(c.part, c.name): c for c in components(recorded)}

    assert found["forward", "Doubled"].num_calls == 3
    assert found["backward", "DoubledBackward"].num_calls == 3
    assert found["optimizer", "SGD.step"].num_calls == 1
    assert ("forward", "aten::mm") not in found  # a part of its function
    assert found["forward", "Doubled"].host_s > found["forward", "aten::sum"].host_s


def test_the_passes_add_up_to_all_components(recorded):
    found = components(recorded)
    total = sum(c.host_s for c in found)
    rows = component_table(found, is_on_gpu=False).splitlines()[1:]
    shares = [float(row[44:].split()[2].rstrip("%")) for row in rows if not row.startswith(" ")]

    assert [row.split()[0] for row in rows if not row.startswith(" ")] == ["forward", "backward", "optimizer"]
    assert sum(shares) == pytest.approx(100, abs=0.2) and total > 0


def test_a_trace_and_a_table_are_left(tmp_path):
    told = []
    with profiled(tmp_path / "profile", "step-000001_update", "cpu", told.append):
        torch.randn(10, 10, requires_grad=True).exp().sum().backward()

    trace = json.loads(gzip.decompress((tmp_path / "profile" / "step-000001_update.trace.json.gz").read_bytes()))
    assert any("ExpBackward0" in event.get("name", "") for event in trace["traceEvents"])
    text = (tmp_path / "profile" / "step-000001_update.txt").read_text()
    assert "backward" in text and "aten::exp" in text
    assert str(tmp_path / "profile" / "step-000001_update.txt") in told[0]
