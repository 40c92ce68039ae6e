"""A folder that is there whole or not at all: written under another name, brought to the disk, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlbench.tracking.errors import TrackingError
from rlbench.tracking.jsonl import fsync_folder
from rlbench.tracking.whole_file import bring_to_disk


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its place at the end. If anything fails, nothing is left.

    Args:
        final: absent or empty.

    Raises:
        TrackingError: it cannot be written.
    """
    from safetensors import SafetensorError

    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    above = [folder for folder in final.parents if not folder.exists()]  # made here, the nearest first
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        bring_to_disk(temporary)
        os.rename(temporary, final)  # an empty folder is replaced
        fsync_folder(final.parent)
    except OSError as error:
        raise TrackingError.from_os_error("export to", final, error) from error
    except SafetensorError as error:  # its writer's way to say what OSError says: disk full
        raise TrackingError(f"cannot export to {final}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in () if final.exists() else above:
            with suppress(OSError):  # another process uses it
                folder.rmdir()
