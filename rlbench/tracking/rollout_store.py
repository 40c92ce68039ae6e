"""Rollouts of a step as one parquet file: flat, typed columns, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlbench.records import Completion, Prompt, RewardComponent, Rollout, RolloutGroup
from rlbench.tracking.errors import TrackingError
from rlbench.tracking.jsonl import fsync_folder
from rlbench.tracking.plain_json import to_json

if TYPE_CHECKING:
    import pyarrow

PREFIXES = {"train": "", "eval": "eval-", "replayed": "replayed-"}  # replayed: trained on, but sampled earlier
JSON_COLUMNS_KEY = b"rlbench.json_columns"  # schema metadata: the columns that hold JSON text


def rollouts_path(folder: str | Path, step: int, phase: str = "train") -> Path:
    """`<folder>/rollouts/step-000012.parquet`, or `eval-step-...` for phase "eval", `replayed-step-...` for "replayed".

    Raises:
        ValueError: for any other phase.
    """
    if phase not in PREFIXES:
        raise ValueError(f"phase must be one of {list(PREFIXES)}, got {phase!r}")
    return Path(folder) / "rollouts" / f"{PREFIXES[phase]}step-{step:06d}.parquet"


def write_rollouts(
    folder: str | Path,
    step: int,
    groups: Sequence[RolloutGroup],
    advantages: Mapping[str, float],
    phase: str = "train",
) -> Path:
    """`write_rollout_file` at the place of a step's rollouts.

    Args:
        folder: the run's folder.
        step: as in `write_rollout_file`, as are groups and advantages.
        phase: "train", "eval" or "replayed".

    Returns:
        Path of the file.

    Raises:
        ValueError: for an unknown phase.
        TrackingError, ValueError: as `write_rollout_file`.
    """
    return write_rollout_file(rollouts_path(folder, step, phase), step, groups, advantages)


def cut_rollouts(folder: str | Path, step: int, evaluated_to: int) -> None:
    """Remove the files of later steps, which a run that goes on from `step` writes anew.

    Args:
        folder: the run's folder.
        step: -1 removes all.
        evaluated_to: the same for evaluations.
    """
    for phase, prefix in PREFIXES.items():
        last = evaluated_to if phase == "eval" else step
        for file in (Path(folder) / "rollouts").glob(f"{prefix}step-*.parquet"):
            number = file.stem.removeprefix(f"{prefix}step-")
            if number.isdecimal() and int(number) > last:
                file.unlink(missing_ok=True)


def write_rollout_file(path: Path, step: int, groups: Sequence[RolloutGroup], advantages: Mapping[str, float]) -> Path:
    """Write one row a rollout, by temporary name, fsync and rename.

    Token ids are the record of what was sampled; in the two text columns a lone surrogate, which UTF-8 cannot hold,
    is written as its escape (`\\ud800`).

    Args:
        path: of the file.
        step: optimizer step that the rollouts were made for.
        groups: may be empty.
        advantages: by rollout_id; a rollout that is missing (no reward, no signal, evaluation) gets null.

    Returns:
        The path.

    Raises:
        TrackingError: if it cannot be written (disk full, no permission); no partial file is left.
        ValueError: for reward names whose columns would clash.
    """
    table = _table(step, [rollout for group in groups for rollout in group.rollouts], advantages)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, table)
    except OSError as error:
        raise TrackingError.from_os_error(f"write the rollouts of step {step} to", path, error) from error
    return path


def read_rollouts(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a rollout file as dicts; `columns` and `component_<name>_details` are decoded from JSON.

    Raises:
        TrackingError: if the file cannot be opened or is no whole parquet file.
    """
    table = read_rollout_table(path)
    json_columns = json.loads((table.schema.metadata or {}).get(JSON_COLUMNS_KEY, b"[]"))
    rows = table.to_pylist()
    for row in rows:
        row.update({name: json.loads(row[name]) for name in json_columns if row[name] is not None})
    return rows


def read_rollout_table(path: str | Path, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """A rollout file as it is stored, for those who read columns.

    Args:
        path: of the file.
        columns: to read; None reads all.

    Raises:
        TrackingError: as `read_rollouts`, or one of the columns is not there.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        # Not `read_table`, which makes a data set of each: 3,000 small files take 3.9 s of a CPU core, this way 2.3 s.
        with Path(path).open("rb") as file, pyarrow.parquet.ParquetFile(file) as found:
            missing = [name for name in columns or () if name not in found.schema_arrow.names]
            if missing:
                raise TrackingError(f"cannot read the rollouts in {path}: they have no column {', '.join(missing)}")
            return found.read(None if columns is None else list(columns), use_threads=False)
    except OSError as error:
        raise TrackingError.from_os_error("read the rollouts in", Path(path), error) from error
    except pyarrow.ArrowInvalid as error:
        raise TrackingError(f"cannot read the rollouts in {path}: not a whole parquet file ({error})") from error


def read_groups(path: str | Path) -> list[RolloutGroup]:
    """The groups of a rollout file as they were recorded, rewards and components included, in their order.

    Raises:
        TrackingError: as `read_rollouts`.
    """
    rows = read_rollouts(path)
    names = (
        [name.removeprefix("component_").removesuffix("_status") for name in rows[0] if _is_status(name)]
        if rows
        else []
    )
    groups = []
    for _, members in groupby(rows, key=lambda row: row["prompt_id"]):
        rollouts = tuple(_rollout(row, names) for row in members)
        groups.append(RolloutGroup(prompt=rollouts[0].prompt, rollouts=rollouts))
    return groups


def _is_status(column: str) -> bool:
    return column.startswith("component_") and column.endswith("_status")


def _rollout(row: Mapping[str, Any], names: Sequence[str]) -> Rollout:
    prompt = Prompt(
        prompt_id=row["prompt_id"],
        text=row["prompt_text"],
        token_ids=tuple(row["prompt_token_ids"]),
        columns=row["columns"],
    )
    completion = Completion(
        token_ids=tuple(row["token_ids"]),
        sampling_logprobs=tuple(row["sampling_logprobs"]),
        finish_reason=row["finish_reason"],
        seed=row["seed"],
        policy_version=row["policy_version"],
        adapter_fingerprint=row["adapter_fingerprint"],
    )
    return Rollout(
        rollout_id=row["rollout_id"],
        prompt=prompt,
        completion=completion,
        completion_text=row["completion_text"],
        sample_index=row["sample_index"],
        components={name: _component(row, name) for name in names if row[f"component_{name}_status"] is not None},
        reward=row["reward"],
        replay_age=row.get("replay_age"),
    )


def _component(row: Mapping[str, Any], name: str) -> RewardComponent:
    """Weights are the config's, not the file's: 1 here."""
    column = f"component_{name}"
    return RewardComponent(
        status=row[f"{column}_status"],
        value=row[column],
        weight=1.0,
        message=row[f"{column}_message"] or "",
        details=row[f"{column}_details"] or {},
    )


def _table(step: int, rollouts: Sequence[Rollout], advantages: Mapping[str, float]) -> pyarrow.Table:
    import pyarrow as pa

    names = list(dict.fromkeys(name for rollout in rollouts for name in rollout.components))
    fields = _base_fields() + _component_fields(names)
    _check_no_clash([field.name for field in fields], names)
    json_columns = ["columns", *(f"component_{utf8(name)}_details" for name in names)]
    schema = pa.schema(fields, metadata={JSON_COLUMNS_KEY: json.dumps(json_columns).encode()})
    rows = [_row(step, rollout, advantages, names) for rollout in rollouts]
    return pa.Table.from_pylist(rows, schema=schema)


def _base_fields() -> list[pyarrow.Field]:
    import pyarrow as pa

    return [
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("completion_text", pa.string(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("sampling_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("policy_version", pa.int64(), nullable=False),
        pa.field("adapter_fingerprint", pa.string(), nullable=False),
        pa.field("reward", pa.float64()),
        pa.field("advantage", pa.float64()),
        pa.field("replay_age", pa.int32()),
        pa.field("columns", pa.string(), nullable=False),
    ]


def _component_fields(names: Sequence[str]) -> list[pyarrow.Field]:
    import pyarrow as pa

    kinds = {"": pa.float64(), "_status": pa.string(), "_message": pa.string(), "_details": pa.string()}
    return [pa.field(f"component_{utf8(name)}{suffix}", kind) for name in names for suffix, kind in kinds.items()]


def _check_no_clash(column_names: Sequence[str], component_names: Sequence[str]) -> None:
    if len(set(column_names)) != len(column_names):
        raise ValueError(f"rewards {list(component_names)} give clashing rollout columns: rename one of them")


def _row(step: int, rollout: Rollout, advantages: Mapping[str, float], names: Sequence[str]) -> dict[str, Any]:
    completion = rollout.completion
    row: dict[str, Any] = {
        "rollout_id": utf8(rollout.rollout_id),
        "step": step,
        "prompt_id": utf8(rollout.prompt.prompt_id),
        "sample_index": rollout.sample_index,
        "prompt_text": utf8(rollout.prompt.text),
        "completion_text": utf8(rollout.completion_text),
        "prompt_token_ids": rollout.prompt.token_ids,
        "token_ids": completion.token_ids,
        "sampling_logprobs": completion.sampling_logprobs,
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
        "policy_version": completion.policy_version,
        "adapter_fingerprint": completion.adapter_fingerprint,
        "reward": rollout.reward,
        "advantage": advantages.get(rollout.rollout_id),
        "replay_age": rollout.replay_age,
        "columns": to_json(rollout.prompt.columns),
    }
    for name in names:
        row |= _component_cells(name, rollout)
    return row


def _component_cells(name: str, rollout: Rollout) -> dict[str, Any]:
    component = rollout.components.get(name)
    if component is None:
        return {}
    column = f"component_{utf8(name)}"
    return {
        column: component.value,
        f"{column}_status": component.status,
        f"{column}_message": utf8(component.message),
        f"{column}_details": to_json(component.details),
    }


def utf8(text: str) -> str:
    """The text with lone surrogates written as their escapes: what UTF-8 can hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _write_atomically(path: Path, table: pyarrow.Table) -> None:
    import pyarrow.parquet

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            pyarrow.parquet.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
