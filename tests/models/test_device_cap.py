"""What hardware.memory_gib does to the facts of a machine and to torch's allocator."""

import pytest
import torch

from rlbench.models import device
from rlbench.models.device import hardware_facts
from rlbench.models.device_cap import exclude_released, set_device_cap

GIB = 2**30


@pytest.fixture
def fractions(monkeypatch):
    """The shares that torch is told on a card of 80 GiB."""
    found = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (79 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", found.append)
    yield found
    set_device_cap(None)


def test_torch_may_take_the_cap_and_what_it_counts_though_it_was_given_back(fractions):
    set_device_cap(24.0)
    exclude_released(8 * GIB)
    exclude_released(0)
    exclude_released(70 * GIB)

    assert fractions == pytest.approx([24 / 80, 32 / 80, 24 / 80, 1.0])


def test_without_a_cap_torch_is_left_alone_and_a_cap_ends_with_its_run(fractions):
    set_device_cap(None)
    exclude_released(8 * GIB)
    assert fractions == []

    set_device_cap(24.0)
    set_device_cap(None)
    exclude_released(8 * GIB)
    assert fractions == pytest.approx([24 / 80, 1.0])


def test_the_facts_are_the_smaller_of_cap_and_free_memory(monkeypatch):
    monkeypatch.setattr(device, "_free_host_bytes", lambda: 20 * GIB)

    assert hardware_facts("cpu").memory_gib == 20
    capped = hardware_facts("cpu", 3.5)
    assert capped.memory_gib == 3.5
    assert capped.memory_words == "hardware.memory_gib=3.5 (20.0 GiB are free)"


def test_a_cap_above_what_is_free_is_refused(monkeypatch):
    monkeypatch.setattr(device, "_free_host_bytes", lambda: 20 * GIB)

    with pytest.raises(ValueError, match=r"hardware.memory_gib is 24, but 20.0 GiB of host memory are free; expected"):
        hardware_facts("cpu", 24.0)
