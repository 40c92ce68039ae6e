"""Rows made by a task of reasoning-gym: question, answer, and the metadata that its scoring rule needs."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from rlbench.config.checks import nearest
from rlbench.config.schema import DataConfig
from rlbench.data.sources import LoadedRows

PREFIX = "reasoning_gym/"
_NUM_ROWS = {"train": 2000, "test": 200}
_TRIES_PER_ROW = 20


def reasoning_rows(config: DataConfig, split: str) -> LoadedRows:
    """Rows of "train" or "test" of the task in `data.name`; a question's text decides its split, so none is in both.

    Raises:
        ValueError: reasoning-gym is not installed, has no such task, or does not take `data.task_params`.
    """
    from datasets import Dataset

    task = config.name.removeprefix(PREFIX)
    problems = _problems(task, config)
    num_rows = min(_NUM_ROWS[split], config.limit or _NUM_ROWS[split])  # some tasks take 5 ms to make a problem
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for index in range(_TRIES_PER_ROW * _NUM_ROWS["train"]):
        if len(rows) == num_rows:
            break
        problem = problems[index]
        question = str(problem["question"])
        if question in seen or _split_of(question) != split:
            continue
        seen.add(question)
        rows.append(
            {
                config.prompt_column: question,
                config.answer_column: str(problem["answer"]),
                "metadata": json.dumps(problem["metadata"], default=str),
                "task": task,
                "row_number": len(rows) + 1,
            }
        )
    if not rows:
        raise ValueError(f"data.name is {config.name!r}, but the task makes no problem for the {split} split")
    description = f"reasoning-gym {task} ({split}): {len(rows)} generated problems"
    return LoadedRows(dataset=Dataset.from_list(rows), description=description, bad_rows=())


def _problems(task: str, config: DataConfig) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f"data.name is {config.name!r}, but reasoning-gym is not installed; expected: pip install reasoning-gym"
        ) from error
    if task not in DATASETS:
        guess = nearest(task, DATASETS, count=3)
        hint = f"; nearest: {', '.join(guess)}" if guess else f"; expected one of: {', '.join(sorted(DATASETS))}"
        raise ValueError(f"data.name is {config.name!r}, but reasoning-gym has no task {task!r}{hint}")
    size = _TRIES_PER_ROW * _NUM_ROWS["train"]
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=config.seed, **config.task_params)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"data.task_params do not fit {task}: {error}") from error


def _split_of(question: str) -> str:
    return "test" if hashlib.sha256(question.encode()).digest()[0] % 10 == 0 else "train"
