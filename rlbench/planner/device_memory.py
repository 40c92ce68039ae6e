"""Memory that this process holds on its device and its highest point in a block: the only device-dependent part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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

    def limit(self) -> int:
        """Bytes that this process could use in all."""
        ...

    @contextmanager
    def watch(self) -> Iterator[Peak]:
        """Fill in the highest number of bytes in use inside."""
        ...


class HostMemory:
    """Resident memory of this process; libraries and freed memory that the allocator keeps count.

    Raises:
        ValueError: the system has no /proc that can be read and reset (Linux has).
    """

    name = "resident memory"

    def __init__(self) -> None:
        try:
            self._reset()
            self.held()
        except OSError as error:
            raise ValueError(
                f"memory cannot be measured here ({error}); plan on a CPU expects Linux's /proc"
            ) from error

    def held(self) -> int:
        return _field(_STATUS, "VmRSS")

    def limit(self) -> int:
        """What is held now plus what the machine has available, at most the container's limit."""
        available = self.held() + _field(_MEMINFO, "MemAvailable")
        try:
            text = (_CGROUP / "memory.max").read_text().strip()
        except OSError:
            return available
        return min(available, int(text)) if text.isdigit() else available

    @contextmanager
    def watch(self) -> Iterator[Peak]:
        peak = Peak()
        self._reset()
        try:
            yield peak
        finally:
            peak.num_bytes = _field(_STATUS, "VmHWM")

    def _reset(self) -> None:
        """Source: proc_pid_clear_refs(5): 5 resets the peak resident set size to the present one."""
        _CLEAR_REFS.write_text("5")


class CudaMemory:
    """Tensors of torch's allocator on the current CUDA device."""

    name = "device memory"

    def held(self) -> int:
        import torch

        return torch.cuda.memory_allocated()

    def limit(self) -> int:
        import torch

        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()

    @contextmanager
    def watch(self) -> Iterator[Peak]:
        import torch

        peak = Peak()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        try:
            yield peak
        finally:
            torch.cuda.synchronize()
            peak.num_bytes = torch.cuda.max_memory_allocated()


def device_memory(profile: str) -> DeviceMemory:
    """Of hardware.profile, cpu or gpu."""
    return CudaMemory() if profile == "gpu" else HostMemory()


def _field(path: Path, name: str) -> int:
    """A line "name:  123 kB" in bytes."""
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
