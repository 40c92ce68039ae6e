"""A batch whose loss or gradient was not finite, kept for inspection: `bad_batches/step-000012.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlbench.tracking.errors import TrackingError


def write_bad_batch(run_folder: Path, step: int, samples: Sequence[Any], facts: Mapping[str, Any]) -> Path:
    """
    Args:
        run_folder: of the run.
        step: that skipped its update.
        samples: dataclasses with everything that the update read.
        facts: what else is known, e.g. loss, gradient norm, policy version.

    Raises:
        TrackingError: it cannot be written.
    """
    path = run_folder / "bad_batches" / f"step-{step:06d}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"step": step, **facts, "samples": [asdict(sample) for sample in samples]}))
    except OSError as error:
        raise TrackingError.from_os_error("keep the batch that gave no finite gradient in", path, error) from error
    return path
