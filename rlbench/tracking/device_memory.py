"""Memory that this process holds on its device and its highest point in a block: the only device-dependent part."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rlbench.config.schema import HardwareConfig

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(slots=True)
class Peak:
    num_bytes: int = 0  # set when the block ends


class DeviceMemory(Protocol):
    name: str

    def held(self) -> int:
        """Bytes in use now."""
        ...

    def settle(self) -> None:
        """Give back what was freed, so that `held` counts what lives."""
        ...

    def limit(self) -> int:
        """Bytes that this process could use in all."""
        ...

    def restart_peak(self) -> None:
        """Forget the highest point: it is what is held now."""
        ...

    def peak(self) -> int:
        """Highest number of bytes in use since the last `restart_peak`."""
        ...

    def peak_reserved(self) -> int | None:
        """Highest number of bytes that an allocator kept for this process meanwhile; None if nothing counts them."""
        ...


class HostMemory:
    """Resident memory of this process; libraries and freed memory that the allocator keeps count.

    Args:
        cap_gib: hardware.memory_gib.

    Raises:
        ValueError: the system has no /proc that can be read and reset (Linux has).
    """

    name = "resident memory"

    def __init__(self, cap_gib: float | None = None) -> None:
        self._cap_gib = cap_gib
        try:
            self.restart_peak()
            self.held()
        except OSError as error:
            raise ValueError(
                f"memory cannot be measured here ({error}); plan on a CPU expects Linux's /proc"
            ) from error

    def held(self) -> int:
        return _field(_STATUS, "VmRSS")

    def settle(self) -> None:
        """Source: malloc_trim(3). glibc keeps freed blocks of up to 32 MiB: most activations are such."""
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
        if trim is not None:
            trim(0)

    def limit(self) -> int:
        """What is held now plus what the machine has available, at most the container's limit and the cap."""
        available = _capped(self.held() + _field(_MEMINFO, "MemAvailable"), self._cap_gib)
        try:
            text = (_CGROUP / "memory.max").read_text().strip()
        except OSError:
            return available
        return min(available, int(text)) if text.isdigit() else available

    def restart_peak(self) -> None:
        """Source: proc_pid_clear_refs(5): 5 resets the peak resident set size to the present one."""
        _CLEAR_REFS.write_text("5")

    def peak(self) -> int:
        return _field(_STATUS, "VmHWM")

    def peak_reserved(self) -> int | None:
        return None


class CudaMemory:
    """Tensors of torch's allocator on the current CUDA device.

    Args:
        released: bytes among them that are not backed by memory now, as `Engine.released_bytes` says. A peak leaves out
            what was given back from the last `restart_peak` on and still is.
        cap_gib: hardware.memory_gib.
    """

    name = "device memory"

    def __init__(self, released: Callable[[], int] = lambda: 0, cap_gib: float | None = None) -> None:
        self._cap_gib = cap_gib
        self._released = released
        self._released_at_restart = 0

    def held(self) -> int:
        import torch

        return torch.cuda.memory_allocated() - self._released()

    def settle(self) -> None:
        gc.collect()  # tensors alone are counted, not what the allocator keeps

    def limit(self) -> int:
        import torch

        free, _ = torch.cuda.mem_get_info()
        return _capped(free + torch.cuda.memory_reserved() - self._released(), self._cap_gib)

    def restart_peak(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()
        self._released_at_restart = self._released()

    def peak(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() - self._released_throughout()

    def peak_reserved(self) -> int | None:
        import torch

        return torch.cuda.max_memory_reserved() - self._released_throughout()

    def _released_throughout(self) -> int:
        return min(self._released_at_restart, self._released())


@contextmanager
def watch(memory: DeviceMemory) -> Iterator[Peak]:
    """Fill in the highest number of bytes in use inside."""
    peak = Peak()
    memory.restart_peak()
    try:
        yield peak
    finally:
        peak.num_bytes = memory.peak()


def device_memory(hardware: HardwareConfig, released: Callable[[], int] = lambda: 0) -> DeviceMemory:
    """
    Args:
        hardware: its profile is cpu or gpu.
        released: as in `CudaMemory`.
    """
    if hardware.profile == "gpu":
        return CudaMemory(released, hardware.memory_gib)
    return HostMemory(hardware.memory_gib)


def _capped(num_bytes: int, cap_gib: float | None) -> int:
    return num_bytes if cap_gib is None else min(num_bytes, int(cap_gib * 2**30))


def _field(path: Path, name: str) -> int:
    """A line "name:  123 kB" in bytes."""
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
