"""Files and folders replaced whole: a reader finds what was there before or what is there now, never a part."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rlbench.tracking.jsonl import fsync_folder


def write_whole(path: Path, text: str) -> None:
    """Write by temporary name, fsync and rename. One process writes to a run's folder, so the name is always the same.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def replace_folder(new: Path, target: Path) -> None:
    """Give `new`, on the same file system, the name of `target`, which may be there.

    Raises:
        OSError: it cannot be renamed.
    """
    bring_to_disk(new)
    before = target.with_name(f".{target.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if target.exists():
        os.rename(target, before)
    os.rename(new, target)
    fsync_folder(target.parent)
    shutil.rmtree(before, ignore_errors=True)


def bring_to_disk(folder: Path) -> None:
    """Every file and folder in it, before the folder gets its name.

    Raises:
        OSError: the disk refuses.
    """
    inside = list(folder.rglob("*"))
    for file in inside:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    for place in [*(path for path in inside if path.is_dir()), folder]:
        fsync_folder(place)
