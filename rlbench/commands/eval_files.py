"""What an evaluation leaves: its numbers as JSON, every answer as parquet. Nothing is overwritten."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlbench.commands.eval_paired import Paired
from rlbench.tracking.environment import environment
from rlbench.tracking.errors import TrackingError
from rlbench.tracking.plain_json import to_plain
from rlbench.tracking.rollout_store import write_rollout_file

if TYPE_CHECKING:
    from rlbench.commands.eval_measure import Measured

_FORMAT = 1
_FOLDER = "evaluations"  # in a run's


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Of one evaluation; the folder is made, so that no other evaluation takes the name."""

    numbers: Path  # FILE.json
    answers: Path  # FILE/

    def give_up(self) -> None:
        """Leave nothing of an evaluation that was not finished."""
        shutil.rmtree(self.answers, ignore_errors=True)
        with suppress(OSError):  # other evaluations are there
            if self.answers.parent.name == _FOLDER:
                self.answers.parent.rmdir()


def reserve(folder: Path, name: str, out: Path | None) -> Places:
    """A place for an evaluation's files.

    Args:
        folder: of the run, where `evaluations/` is made.
        name: that the files begin with.
        out: the user's FILE.json; None: one in `folder`.

    Raises:
        ValueError: `out` is no JSON file, or is there already.
        TrackingError: the folder cannot be made.
    """
    if out is not None and out.suffix != ".json":
        raise ValueError(f"--out is {out}, expected a file that ends in .json")
    started = f"{name}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    for number in count(1):
        inside = folder / _FOLDER / (started if number == 1 else f"{started}_{number}")
        answers = inside if out is None else out.with_suffix("")
        numbers = answers.with_name(f"{answers.name}.json")
        try:
            answers.parent.mkdir(parents=True, exist_ok=True)
            if not numbers.exists():
                answers.mkdir()
                return Places(numbers=numbers, answers=answers)
        except FileExistsError:
            pass
        except OSError as error:
            raise TrackingError.from_os_error("write an evaluation to", answers, error) from error
        if out is not None:
            taken = numbers if numbers.exists() else answers
            raise ValueError(f"--out is {out}, but {taken} is there already; expected the name of a new file")
    raise AssertionError("count never ends")


def write(places: Places, data: str, policy: Measured, against: Measured | None, pairs: Sequence[Paired]) -> list[Path]:
    """Write all files; returns those of the answers.

    Args:
        places: from `reserve`.
        data: what was asked, in words.
        policy: that was evaluated.
        against: what it is compared with, if anything.
        pairs: of the two.

    Raises:
        TrackingError: a file cannot be written.
    """
    sides = {"policy": policy, **({"against": against} if against else {})}
    files = {name: _write_answers(places.answers, name, measured) for name, measured in sides.items()}
    record = {
        "format": _FORMAT,
        "data": data,
        **{name: _side_record(measured, files[name]) for name, measured in sides.items()},
        "paired": [{**asdict(paired), "difference": paired.difference} for paired in pairs],
        "environment": environment(),
    }
    try:
        with places.numbers.open("x") as file:
            file.write(json.dumps(to_plain(record), indent=1, allow_nan=False))
    except OSError as error:
        raise TrackingError.from_os_error("write an evaluation to", places.numbers, error) from error
    return [file for found in files.values() for file in found]


def _write_answers(folder: Path, name: str, measured: Measured) -> list[Path]:
    files = {f"{name}.parquet": measured.groups, f"{name}-sampled.parquet": measured.sampled}
    step = measured.side.step
    return [write_rollout_file(folder / file, step, groups, {}) for file, groups in files.items() if groups]


def _side_record(measured: Measured, files: Sequence[Path]) -> dict[str, Any]:
    side, evaluation, inputs = measured.side, measured.evaluation, measured.inputs
    return {
        "name": side.name,
        "run": None if side.run_folder is None else str(side.run_folder.resolve()),
        "checkpoint": None if side.checkpoint is None else str(side.checkpoint.folder.resolve()),
        "step": side.step,
        "policy_version": side.policy_version,
        "fingerprint": measured.fingerprint,
        "model": {"name": inputs.model.name, "description": inputs.model.description},
        "num_correct": evaluation.num_correct,
        "num_with_verdict": len(evaluation.is_correct),
        "metrics": evaluation.metrics,
        "identity": measured.proof,
        "verifier_failures": [
            {"component": name, "status": status, "count": number}
            for (name, status), number in sorted(measured.failures.items())
        ],
        "is_correct": evaluation.is_correct,
        "sampled_share": evaluation.sampled,
        "seconds": measured.seconds,
        "answers": [file.name for file in files],
        "config": asdict(inputs.config),
        "derived": {d.key: {"value": d.value, "reason": d.reason} for d in inputs.derived},
    }
