import numpy as np
import pytest

from rlbench.tracking import device_memory
from rlbench.tracking.device_memory import HostMemory, watch

MIB = 2**20


def touched(num_mib: int) -> np.ndarray:
    return np.ones(num_mib * MIB, dtype=np.uint8)


def test_a_block_that_is_held_counts_as_held():
    memory = HostMemory()
    before = memory.held()

    block = touched(64)

    assert memory.held() - before == pytest.approx(block.nbytes, abs=4 * MIB)


def test_the_peak_counts_what_was_freed_inside_and_forgets_what_came_before():
    memory = HostMemory()
    touched(192)
    before = memory.held()

    with watch(memory) as peak:
        touched(64)

    assert peak.num_bytes - before == pytest.approx(64 * MIB, abs=4 * MIB)


def test_the_limit_is_at_most_the_containers(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("123456789\n")
    monkeypatch.setattr(device_memory, "_CGROUP", tmp_path)
    assert HostMemory().limit() == 123456789

    (tmp_path / "memory.max").write_text("max\n")
    assert HostMemory().limit() > 123456789


def test_a_system_without_proc_gets_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(device_memory, "_CLEAR_REFS", tmp_path / "none" / "clear_refs")

    with pytest.raises(ValueError, match="plan on a CPU expects Linux's /proc"):
        HostMemory()
