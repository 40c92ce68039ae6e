"""What one job may use."""

from __future__ import annotations

import math
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one job. Its memory is at most `memory_mib` plus the scratch folder; with processes of its own twice
    `memory_mib`, watched from outside (`tree_watch`).

    Example:
        Limits(timeout_s=2.0, memory_mib=512)
    """

    timeout_s: float = 6.0  # wall clock; the job is killed then
    memory_mib: int = 1024  # address space of a process
    file_mib: int = 16  # largest file
    output_kib: int = 1024  # stdout and stderr together; the job is killed above
    num_processes: int = 32  # with threads
    num_files: int = 128  # open at once
    allow_subprocess: bool = False  # threads are always allowed

    def __post_init__(self) -> None:
        if not math.isfinite(self.timeout_s) or self.timeout_s <= 0:
            raise ValueError(f"timeout_s is {self.timeout_s}, expected a positive number of seconds")
        for name in ("memory_mib", "file_mib", "output_kib", "num_processes", "num_files"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
        if self.memory_mib < 64:
            raise ValueError(f"memory_mib is {self.memory_mib}, expected at least 64: Python itself needs 40")

    @property
    def total_memory_bytes(self) -> int:
        """Resident memory of all its processes together, where it may start some."""
        return 2 * self.memory_mib * MIB

    def as_spec(self) -> dict[str, object]:
        """The form that a job receives."""
        return {
            "memory_bytes": self.memory_mib * MIB,
            "cpu_s": math.ceil(self.timeout_s) + 1,
            "file_bytes": self.file_mib * MIB,
            "num_files": self.num_files,
            "num_processes": self.num_processes,
            "allow_subprocess": self.allow_subprocess,
        }
