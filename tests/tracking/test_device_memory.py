import mmap

import numpy as np
import pytest

from rlbench.tracking import device_memory
from rlbench.tracking.device_memory import CudaMemory, HostMemory, watch

MIB = 2**20


def touched(num_mib: int) -> np.ndarray:
    """New pages of the system: malloc may reuse resident ones that earlier tests freed."""
    block = np.frombuffer(mmap.mmap(-1, num_mib * MIB), dtype=np.uint8)
    block[:] = 1
    return block


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


class Cuda:
    """What torch counts on a card of 80 MiB; `released` of the allocated bytes have no memory behind them."""

    allocated, highest, reserved, released = 30, 30, 40, 0


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    import torch

    state = Cuda()
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: state.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: state.highest)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: state.reserved)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: state.reserved)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 - state.reserved + state.released, 80))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(state, "highest", state.allocated))
    return state


def test_what_a_sleeping_engine_gave_back_is_not_in_use(cuda):
    memory = CudaMemory(lambda: cuda.released)
    assert (memory.held(), memory.limit()) == (30, 80)

    cuda.released = 20
    assert (memory.held(), memory.limit()) == (10, 80)


def test_a_peak_leaves_out_what_was_given_back_all_the_time(cuda):
    memory = CudaMemory(lambda: cuda.released)
    cuda.released = 20
    memory.restart_peak()
    cuda.highest = 45
    assert (memory.peak(), memory.peak_reserved()) == (25, 20)

    cuda.released = 0  # the engine woke meanwhile: the highest point may have been with its cache
    assert memory.peak() == 45

    memory.restart_peak()
    cuda.released = 20
    assert memory.peak() == 30


def test_the_limit_is_at_most_the_cap(cuda):
    cap_gib = 50 / 2**30
    assert CudaMemory(lambda: 0, cap_gib).limit() == 50
    assert CudaMemory(lambda: 0, 2 * cap_gib).limit() == 80
    assert HostMemory(0.125).limit() == 2**27 < HostMemory().limit()
