"""The highest memory of each phase of a step, for metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlbench.tracking.device_memory import DeviceMemory, device_memory

GIB = 2**30
_PEAK = "peak"


class PhaseMemory:
    """Reads the device's highest point at the end of each phase and starts it anew.

    Args:
        memory: None where it cannot be measured: then there is nothing to report.

    Example:
        with memory.phase("update"): ...
        memory.take()  # {"memory/update_gib": 3.1, "memory/peak_gib": 3.1}
    """

    def __init__(self, memory: DeviceMemory | None) -> None:
        self._memory = memory
        self._highest: dict[str, int] = {}
        if memory is not None:
            memory.restart_peak()

    @classmethod
    def of_profile(cls, profile: str, released: Callable[[], int] = lambda: 0) -> PhaseMemory:
        """Arguments as of `device_memory`."""
        try:
            return cls(device_memory(profile, released))
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
        """`memory/<phase>_gib` and `memory/peak_gib` since the last call; on CUDA also what the allocator reserved."""
        self._count(_PEAK)
        metrics = {f"memory/{name}_gib": value / GIB for name, value in self._highest.items()}
        self._highest = {}
        return metrics

    def _count(self, name: str) -> None:
        if self._memory is None:
            return
        points = {"": self._memory.peak()} | {"_reserved": self._memory.peak_reserved()}
        self._memory.restart_peak()
        for suffix, num_bytes in points.items():
            for key in (f"{name}{suffix}", f"{_PEAK}{suffix}"):
                if num_bytes is not None:
                    self._highest[key] = max(self._highest.get(key, 0), num_bytes)
