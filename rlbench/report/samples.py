"""Rollouts as a page can hold many of them: an index by columns, and the texts in compressed chunks, one a file.

The page filters on the index alone and unpacks a chunk when it is looked at.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlbench.report.rollout_files import RolloutFile
from rlbench.report.token_pieces import Vocabulary

if TYPE_CHECKING:
    import pyarrow

_FIRST_CHARACTER = 35  # "#": above the quote, so that JSON escapes next to nothing
MAX_LEVEL = 89
LEVELS_PER_ROOT = 20  # a logprob is kept as the nearest integer to this many times the root of its size
SUFFIXES = ("_status", "_message", "_details")


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What the page gets.

    Example:
        Samples(index={"step": [1, 1], "reward": [0.5, None], ...}, chunks=("H4sI...",))
    """

    index: dict[str, Any]  # columns of equal length, one entry a rollout; "components": values by name
    chunks: tuple[str, ...]  # base64 of gzip of JSON


def pack_samples(files: Sequence[RolloutFile], vocabulary: Vocabulary | None, answer_column: str) -> Samples:
    """Index and chunks of rollout files.

    Args:
        files: the rollouts to show.
        vocabulary: of the model; None leaves tokens out.
        answer_column: of the data row, shown beside the completions.
    """
    index: dict[str, Any] = {key: [] for key in _COLUMNS} | {"components": {}}
    prompts: dict[str, int] = {}
    chunks = []
    for number, file in enumerate(files):
        table = file.read()
        _add_components(index, table)
        index["chunk"] += [number] * table.num_rows
        index["step"] += [file.step] * table.num_rows
        index["isEval"] += [int(file.is_evaluation)] * table.num_rows
        _add_to_index(index, table, prompts)
        chunks.append(_compress(_texts(table, vocabulary, answer_column)))
    return Samples(index=index | {"prompts": list(prompts)}, chunks=tuple(chunks))


_COLUMNS = ("chunk", "row", "step", "isEval", "prompt", "sample", "reward", "advantage", "isCut", "tokens")


def component_columns(table: pyarrow.Table) -> list[str]:
    """Names of the reward components of a file."""
    found = [name for name in table.column_names if name.startswith("component_") and not name.endswith(SUFFIXES)]
    return [name.removeprefix("component_") for name in found]


def _add_components(index: dict[str, Any], table: pyarrow.Table) -> None:
    """Values by component; None for the rollouts of files without it."""
    num_before = len(index["step"])
    for name in component_columns(table):
        index["components"].setdefault(name, [None] * num_before)
    for name, values in index["components"].items():
        key = f"component_{name}"
        values += _rounded(table.column(key).to_pylist()) if key in table.column_names else [None] * table.num_rows


def _add_to_index(index: dict[str, Any], table: pyarrow.Table, prompts: dict[str, int]) -> None:
    index["row"] += range(table.num_rows)
    index["prompt"] += [prompts.setdefault(p, len(prompts)) for p in table.column("prompt_id").to_pylist()]
    index["sample"] += table.column("sample_index").to_pylist()
    index["reward"] += _rounded(table.column("reward").to_pylist())
    index["advantage"] += _rounded(table.column("advantage").to_pylist())
    index["isCut"] += [int(reason == "length") for reason in table.column("finish_reason").to_pylist()]
    index["tokens"] += table.column("token_ids").combine_chunks().value_lengths().to_pylist()


def _texts(table: pyarrow.Table, vocabulary: Vocabulary | None, answer_column: str) -> dict[str, Any]:
    texts, ids = table.column("completion_text").to_pylist(), table.column("token_ids").to_pylist()
    lengths = [
        vocabulary.lengths(tokens, text) if vocabulary else None for tokens, text in zip(ids, texts, strict=True)
    ]
    logprobs = table.column("sampling_logprobs").to_pylist()
    prompt_ids = table.column("prompt_id").to_pylist()
    answers = [_answer(row, answer_column) for row in table.column("columns").to_pylist()]
    return {
        "texts": texts,
        "lengths": ["".join(_character(n) for n in found) if found and max(found) <= MAX_LEVEL else None
                    for found in lengths],
        "logprobs": ["".join(_character(_level(p)) for p in row) for row in logprobs],
        "prompts": dict(zip(prompt_ids, table.column("prompt_text").to_pylist(), strict=True)),
        "answers": {prompt: answer for prompt, answer in zip(prompt_ids, answers, strict=True) if answer is not None},
        "messages": _messages(table),
    }  # fmt: skip


def _messages(table: pyarrow.Table) -> dict[int, list[str]]:
    """By row: what went wrong with a reward component."""
    found: dict[int, list[str]] = {}
    for name in component_columns(table):
        statuses = table.column(f"component_{name}_status").to_pylist()
        texts = table.column(f"component_{name}_message").to_pylist()
        for row, (status, text) in enumerate(zip(statuses, texts, strict=True)):
            if status not in (None, "value"):
                found.setdefault(row, []).append(f"{name}: {status}" + (f", {text}" if text else ""))
    return found


def _answer(columns: str | None, answer_column: str) -> str | None:
    row = json.loads(columns) if columns else {}
    answer = row.get(answer_column) if isinstance(row, dict) else None
    return None if answer is None else str(answer)


def _level(logprob: float) -> int:
    if math.isnan(logprob):
        return MAX_LEVEL
    return min(MAX_LEVEL, round(LEVELS_PER_ROOT * math.sqrt(max(0.0, -logprob))))


def _character(number: int) -> str:
    return chr(_FIRST_CHARACTER + number)


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None or not math.isfinite(value) else round(value, 4) for value in values]


def _compress(content: dict[str, Any]) -> str:
    raw = json.dumps(content, separators=(",", ":"), ensure_ascii=True).encode()
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode()
