"""Memory by phase, with a device whose numbers are scripted."""

import numpy as np
import pytest

from rlbench.config.schema import HardwareConfig
from rlbench.tracking.phase_memory import GIB, PhaseMemory


class Scripted:
    """`use` raises the peak; a restart makes it what is held: 1 GiB."""

    name = "scripted"

    def __init__(self, reserved: int | None = None) -> None:
        self.highest = GIB
        self.reserved = reserved

    def use(self, gib: float) -> None:
        self.highest = max(self.highest, int(gib * GIB))

    def restart_peak(self) -> None:
        self.highest = GIB

    def peak(self) -> int:
        return self.highest

    def peak_reserved(self) -> int | None:
        return self.reserved


def test_each_phase_has_its_own_peak_and_the_step_the_highest_of_all():
    device = Scripted()
    memory = PhaseMemory(device)
    for phase, gib in (("generation", 2), ("weight sync", 1.5), ("generation", 3)):
        with memory.phase(phase):
            device.use(gib)
    device.use(4)  # between phases

    assert memory.take() == {"memory/generation_gib": 3, "memory/weight_sync_gib": 1.5, "memory/peak_gib": 4}
    assert memory.take() == {"memory/peak_gib": 1}


def test_what_an_allocator_reserved_comes_beside_what_was_used():
    memory = PhaseMemory(Scripted(reserved=8 * GIB))
    with memory.phase("update"):
        pass

    assert memory.take() == {
        "memory/update_gib": 1, "memory/update_reserved_gib": 8, "memory/peak_gib": 1, "memory/peak_reserved_gib": 8
    }  # fmt: skip


def test_a_phase_that_fails_is_counted():
    device = Scripted()
    memory = PhaseMemory(device)
    with pytest.raises(KeyError), memory.phase("update"):
        device.use(2)
        raise KeyError

    assert memory.take()["memory/update_gib"] == 2


def test_where_memory_cannot_be_measured_nothing_is_claimed(monkeypatch, tmp_path):
    monkeypatch.setattr("rlbench.tracking.device_memory._CLEAR_REFS", tmp_path / "none" / "clear_refs")
    memory = PhaseMemory.of_hardware(HardwareConfig(profile="cpu"))
    with memory.phase("update"):
        pass

    assert memory.take() == {}


def test_a_processs_own_memory_is_counted_by_phase():
    memory = PhaseMemory.of_hardware(HardwareConfig(profile="cpu"))
    with memory.phase("large"):
        np.ones(128 * 2**20, dtype=np.uint8)
    with memory.phase("small"):
        pass
    found = memory.take()

    assert found["memory/large_gib"] - found["memory/small_gib"] == pytest.approx(1 / 8, abs=0.02)
    assert found["memory/peak_gib"] == found["memory/large_gib"]


def test_a_cap_is_reported_beside_what_was_used():
    memory = PhaseMemory.of_hardware(HardwareConfig(profile="cpu", memory_gib=2.5))
    with memory.phase("update"):
        pass

    metrics = memory.take()
    assert metrics["memory/cap_gib"] == 2.5 and 0 < metrics["memory/update_gib"] < 2.5
