"""The highest memory of each phase of a step, for metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlbench.config.schema import HardwareConfig
from rlbench.tracking.device_memory import DeviceMemory, device_memory

GIB = 2**30
_PEAK = "peak"


class PhaseMemory:
    """Reads the device's highest point at the end of each phase and starts it anew.

    Args:
        memory: None where it cannot be measured: then there is nothing to report.
        cap_gib: hardware.memory_gib, reported beside what was used.

    Example:
        with memory.phase("update"): ...
        memory.take()  # {"memory/update_gib": 3.1, "memory/peak_gib": 3.1}
    """

    def __init__(self, memory: DeviceMemory | None, cap_gib: float | None = None) -> None:
        self._memory = memory
        self._cap = {} if memory is None or cap_gib is None else {"memory/cap_gib": cap_gib}
        self._highest: dict[str, int] = {}
        if memory is not None:
            memory.restart_peak()

    @classmethod
    def of_hardware(cls, hardware: HardwareConfig, released: Callable[[], int] = lambda: 0) -> PhaseMemory:
        """Arguments as of `device_memory`."""
        try:
            return cls(device_memory(hardware, released), hardware.memory_gib)
        except ValueError:
            return cls(None)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is used inside for `name`. Phases follow each other, they do not nest."""
        self._count(_PEAK)  # of what came between phases
        try:
            yield
        finally:
            self._count(name.replace(" ", "_"))

    def take(self) -> dict[str, float]:
        """`memory/<phase>_gib`, `memory/peak_gib` since the last call, and the cap; on CUDA also what was reserved."""
        self._count(_PEAK)
        metrics = {f"memory/{name}_gib": value / GIB for name, value in self._highest.items()}
        self._highest = {}
        return metrics | self._cap

    def _count(self, name: str) -> None:
        if self._memory is None:
            return
        points = {"": self._memory.peak()} | {"_reserved": self._memory.peak_reserved()}
        self._memory.restart_peak()
        for suffix, num_bytes in points.items():
            for key in (f"{name}{suffix}", f"{_PEAK}{suffix}"):
                if num_bytes is not None:
                    self._highest[key] = max(self._highest.get(key, 0), num_bytes)
