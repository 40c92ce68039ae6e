"""The error of a run whose records can no longer be kept."""

from __future__ import annotations

from pathlib import Path

FILE_STATUS = 4  # exit status of a command that cannot read or write a file


class TrackingError(Exception):
    """What could not be written or read, where, and the operating system's reason.

    Example:
        TrackingError: cannot write the metrics of step 12 to outputs/x/metrics.jsonl: No space left on device
    """

    @classmethod
    def from_os_error(cls, what: str, path: Path, error: OSError) -> TrackingError:
        """Say `cannot <what> <path>: <reason>`."""
        return cls(f"cannot {what} {path}: {error.strerror or error}")
