"""Rollout files of a run: which there are, what the health rules take from them, and which ones a report shows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlbench.tracking.errors import TrackingError
from rlbench.tracking.rollout_store import read_rollout_table

if TYPE_CHECKING:
    import pyarrow

_SCANNED = ("prompt_id", "token_ids", "reward", "completion_text")
_NAME = re.compile(r"(eval-)?step-(\d+)\.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutFile:
    """One step's rollouts, or one evaluation's. The rollouts themselves are read when they are needed."""

    path: Path
    step: int
    is_evaluation: bool
    num_rollouts: int
    num_tokens: int
    metrics: Mapping[str, float]  # `group_metrics`

    def read(self) -> pyarrow.Table:
        return read_rollout_table(self.path)


def read_files(run_folder: Path) -> tuple[list[RolloutFile], list[str]]:
    """All rollout files in the order of steps, those of training first, then evaluations.

    Returns:
        The files, and one sentence for each that is damaged.
    """
    found = []
    for path in (run_folder / "rollouts").glob("*.parquet"):
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((bool(match.group(1)), int(match.group(2)), path))
    files, notes = [], []
    for is_evaluation, step, path in sorted(found):
        try:
            table = read_rollout_table(path, _SCANNED)
        except TrackingError as error:
            notes.append(f"A file of rollouts was left out: {error}.")
            continue
        num_tokens = len(table.column("token_ids").combine_chunks().flatten())
        files.append(
            RolloutFile(
                path=path,
                step=step,
                is_evaluation=is_evaluation,
                num_rollouts=table.num_rows,
                num_tokens=num_tokens,
                metrics=group_metrics(table),
            )
        )
    return files, notes


def choose(files: Sequence[RolloutFile], max_rollouts: int, max_tokens: int) -> list[RolloutFile]:
    """As many files as fit, evenly spread over the run, first and last among them.

    Args:
        files: of a run.
        max_rollouts: most rollouts together.
        max_tokens: most completion tokens together.
    """
    rollouts, tokens = sum(f.num_rollouts for f in files), sum(f.num_tokens for f in files)
    share = min(1.0, max_rollouts / max(rollouts, 1), max_tokens / max(tokens, 1))
    if share == 1.0 or not files:
        return list(files)
    num = max(1, int(share * len(files)))
    places = {round(i * (len(files) - 1) / max(num - 1, 1)) for i in range(num)} if num > 1 else {len(files) - 1}
    return [file for i, file in enumerate(files) if i in places]


def group_metrics(table: pyarrow.Table) -> dict[str, float]:
    """What metrics.jsonl does not hold and health rules can use, keys as in `rlbench.checks.health_signal`.

    `groups/length_reward_correlation`: of length and reward, each minus its group's mean; absent without spread.
    `groups/repeated_completion_frac`: completions that equal an earlier one of their group.
    """
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(table.column("prompt_id").to_pylist()):
        groups.setdefault(prompt, []).append(row)
    lengths = table.column("token_ids").combine_chunks().value_lengths().to_pylist()
    rewards, texts = table.column("reward").to_pylist(), table.column("completion_text").to_pylist()
    pairs = []
    for rows in groups.values():
        known = [(lengths[i], rewards[i]) for i in rows if rewards[i] is not None]
        pairs += _without_mean(known)
    num_different = sum(len({texts[i] for i in rows}) for rows in groups.values())
    metrics = {"groups/repeated_completion_frac": 1 - num_different / len(texts)} if texts else {}
    correlation = _correlation(pairs)
    return metrics | ({} if correlation is None else {"groups/length_reward_correlation": correlation})


def metrics_by_step(files: Sequence[RolloutFile]) -> Mapping[int, dict[str, float]]:
    """The metrics of every training step."""
    return {file.step: dict(file.metrics) for file in files if not file.is_evaluation}


def _without_mean(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(pairs) < 2:
        return []
    mean_a, mean_b = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
    return [(a - mean_a, b - mean_b) for a, b in pairs]


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Of pairs whose means are 0."""
    squares_a, squares_b = sum(a * a for a, _ in pairs), sum(b * b for _, b in pairs)
    if squares_a < 1e-9 or squares_b < 1e-9:
        return None
    return sum(a * b for a, b in pairs) / (squares_a * squares_b) ** 0.5
