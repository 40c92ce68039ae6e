"""`chain.json`: which stages of a chain are finished, and with which adapter."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlbench.tracking.whole_file import write_whole

RECORD_NAME = "chain.json"


@dataclass(slots=True)
class ChainRecord:
    """Of one chain; the file changes whole, after a stage is finished."""

    folder: Path
    names: list[str]
    adapter_sha256: list[str]  # of the finished stages, in order

    @classmethod
    def open(cls, folder: Path, names: Sequence[str]) -> ChainRecord:
        """Read the record of `folder`; without one, none is finished.

        Raises:
            ValueError: other stages were finished there, or an adapter is not the one that was recorded.
        """
        file = folder / RECORD_NAME
        finished = json.loads(file.read_text())["finished"] if file.is_file() else []
        done = [entry["name"] for entry in finished]
        if done != list(names[: len(done)]):
            raise ValueError(
                f"chain has the stages {', '.join(names)}, but in {folder} {', '.join(done)} are finished; expected "
                "the same names in the same order, or a new chain"
            )
        record = cls(folder, list(names), [entry["adapter_sha256"] for entry in finished])
        for index, digest in enumerate(record.adapter_sha256):
            if record._digest(index) != digest:
                raise ValueError(
                    f"{record.folders[index] / 'adapter'} is missing or has changed since its stage finished; "
                    f"expected SHA-256 {digest} ({file})"
                )
        return record

    @property
    def num_finished(self) -> int:
        return len(self.adapter_sha256)

    @property
    def folders(self) -> list[Path]:
        """Of the stages' runs."""
        return [self.folder / f"{index}_{name}" for index, name in enumerate(self.names, start=1)]

    def finish(self, index: int) -> None:
        """Write that the stage is done."""
        assert index == self.num_finished
        digest = self._digest(index)
        assert digest is not None, "a finished run has an adapter"
        self.adapter_sha256.append(digest)
        self.write()

    def write(self) -> None:
        """Replace the file by what this record holds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        finished = [
            {"name": name, "folder": folder.name, "adapter_sha256": digest}
            for name, folder, digest in zip(self.names, self.folders, self.adapter_sha256, strict=False)
        ]
        text = json.dumps({"stages": self.names, "finished": finished}, indent=1) + "\n"
        write_whole(self.folder / RECORD_NAME, text)

    def has_checkpoint(self, index: int) -> bool:
        from rlbench.training.checkpoint import has_checkpoint

        return has_checkpoint(self.folders[index])

    def clear(self, index: int) -> None:
        """Remove what a stage without a checkpoint left."""
        shutil.rmtree(self.folders[index], ignore_errors=True)

    def derived(self, index: int) -> dict[str, Any]:
        """`derived.json` of a stage that has begun."""
        return json.loads((self.folders[index] / "derived.json").read_text())

    def _digest(self, index: int) -> str | None:
        file = self.folders[index] / "adapter" / "adapter_model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
