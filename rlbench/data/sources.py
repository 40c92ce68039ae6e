"""Where data rows come from: a file, the hub, or generated problems."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlbench.config.checks import nearest
from rlbench.config.schema import DataConfig
from rlbench.data.hub import hub_problem
from rlbench.data.row_files import FORMATS, file_rows

if TYPE_CHECKING:
    from datasets import Dataset

_HUB = {
    "gsm8k": ("openai/gsm8k", "main"),
    "math": ("nlile/hendrycks-MATH-benchmark", "default"),
    "mbpp": ("google-research-datasets/mbpp", "full"),
}
_IMITATED = ("gsm8k",)  # what generated problems can stand in for
_NUM_GENERATED = {"train": 2000, "test": 500}
_GENERATED_SUFFIX = " Give the result as your final answer. Do not include units."
_NUM_LISTED = 5
_LARGEST_INT = 2**63 - 1  # of a table's column
RowProblem = Callable[[dict[str, Any], DataConfig], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRows:
    """Rows of one split; `row_number` of a row is its place in the source, from 1."""

    dataset: Dataset  # columns of the source plus "row_number"
    description: str  # what the rows are, in plain words
    bad_rows: tuple[str, ...]  # one line for each row that was left out


def check_paths(config: DataConfig) -> None:
    """Fail at once if a file that the config names is not there.

    Raises:
        ValueError: as `load_rows` would.
    """
    for key, path in (("data.path", config.path), ("data.eval_path", config.eval_path)):
        if path is not None and not Path(path).expanduser().is_file():
            raise ValueError(f"{key} is {path}, but there is no such file; expected one of {FORMATS}")


def load_rows(config: DataConfig, split: str, row_problem: RowProblem | None = None) -> LoadedRows:
    """Load the rows of "train" or "test".

    Args:
        config: the `data` part of the config.
        split: "train" or "test".
        row_problem: what is wrong with a row of a file ("" if nothing is); None: prompt and answer must be there.

    Raises:
        ValueError: the source cannot be had, a column is missing, or more rows than `data.max_bad_rows` are broken.
    """
    check_paths(config)
    loaded = _load(config, split, row_problem)
    return _without(loaded, config) if config.answer_remove else loaded


def _load(config: DataConfig, split: str, row_problem: RowProblem | None) -> LoadedRows:
    path = config.path if split == "train" else config.eval_path
    if path is not None:
        key = "data.path" if split == "train" else "data.eval_path"
        return _from_file(Path(path).expanduser(), key, config, row_problem or answer_problem)
    if config.name.startswith("reasoning_gym/"):
        from rlbench.data.reasoning_rows import reasoning_rows

        return reasoning_rows(config, split)
    if config.name not in _HUB:
        raise ValueError(
            f"data.name is {config.name!r}, expected one of: {', '.join(_HUB)}, reasoning_gym/TASK, or data.path=FILE"
        )
    if config.source == "generated" and config.name in _IMITATED:
        return _generated(config, split, "as data.source asks for")
    problem = hub_problem()
    if problem is None:
        return _from_hub(config, split)
    if config.source == "hub" or config.name not in _IMITATED:
        raise ValueError(
            f"data.name is {config.name} and data.source is {config.source}, but the hub cannot be reached "
            f"({problem}); expected a network, or data.path=FILE.jsonl with the columns "
            f"{', '.join([config.prompt_column, config.answer_column, *config.shown_columns])}"
        )
    return _generated(config, split, f"because the hub cannot be reached ({problem})")


def _without(loaded: LoadedRows, config: DataConfig) -> LoadedRows:
    """The rows, their answers less what `data.answer_remove` matches."""
    column, pattern = config.answer_column, re.compile(config.answer_remove or "")
    if column not in loaded.dataset.column_names:
        return loaded
    answers = [pattern.sub("", text) if isinstance(text, str) else text for text in loaded.dataset[column]]
    num_changed = sum(new != old for new, old in zip(answers, loaded.dataset[column], strict=True))
    empty = next((i for i, answer in enumerate(answers) if isinstance(answer, str) and not answer.strip()), None)
    if empty is not None:
        number = loaded.dataset["row_number"][empty]
        raise ValueError(
            f"data.answer_remove is {config.answer_remove!r}, which leaves nothing of the answer in row {number}; "
            "expected a pattern of what is no part of an answer"
        )
    if not num_changed:
        return loaded
    return replace(
        loaded,
        dataset=loaded.dataset.remove_columns(column).add_column(column, answers),  # type: ignore[call-arg]
        description=f"{loaded.description}, of which {num_changed} answers less data.answer_remove",
    )


def _from_file(path: Path, key: str, config: DataConfig, row_problem: RowProblem) -> LoadedRows:
    rows, bad_rows = [], []
    for row in file_rows(path, key):
        problem = row.problem or row_problem(row.values, config)
        if problem:
            bad_rows.append(f"{row.place}: {problem}")
        else:
            rows.append({**row.values, "row_number": row.number})
    _check_bad_rows(bad_rows, f"{path}", config)
    if not rows:
        raise ValueError(f"{key} is {path}, but it holds no row; expected {FORMATS}")
    texts = [
        name for name in (config.prompt_column, config.answer_column) if _is_mixed([row.get(name) for row in rows])
    ]
    rows = [{**row, **{name: str(row[name]) for name in texts if row.get(name) is not None}} for row in rows]
    return LoadedRows(
        dataset=_dataset(rows, str(path)), description=f"{path}: {len(rows)} rows", bad_rows=tuple(bad_rows)
    )


def _is_mixed(values: Sequence[Any]) -> bool:
    """Of the texts and numbers of a column: a table would refuse them, or make 2.0 of 2. Lists and objects are left."""
    kinds = {type(value) for value in values if value is not None}
    is_long = any(isinstance(value, int) and abs(value) > _LARGEST_INT for value in values)
    return kinds <= {str, int, float, bool} and (len(kinds) > 1 or is_long)


def answer_problem(row: dict[str, Any], config: DataConfig) -> str:
    """Of rows with a prompt and an answer: what is wrong, "" if nothing is."""
    for key, column in (("data.prompt_column", config.prompt_column), ("data.answer_column", config.answer_column)):
        if column not in row:
            guess = nearest(column, map(str, row), count=1)
            hint = f"; did you mean {guess[0]}?" if guess else ""
            return f"no column {column!r} ({key}), it has {', '.join(map(str, row)) or 'none'}{hint}"
        value = row[column]
        if not isinstance(value, (str, int, float)) or not str(value).strip():
            return f"column {column!r} is {value!r}, expected text"
        if isinstance(value, float) and not math.isfinite(value):
            return f"column {column!r} is {value}, expected text or a finite number"
    return ""


def _check_bad_rows(bad_rows: list[str], source: str, config: DataConfig) -> None:
    if len(bad_rows) > config.max_bad_rows:
        listed = "; ".join(bad_rows[:_NUM_LISTED]) + ("; ..." if len(bad_rows) > _NUM_LISTED else "")
        raise ValueError(
            f"{source} has {len(bad_rows)} rows that cannot be used, data.max_bad_rows allows {config.max_bad_rows}: "
            f"{listed}"
        )


def _dataset(rows: list[dict[str, Any]], source: str) -> Dataset:
    from datasets import Dataset

    # `from_list` takes its columns from the first row and would drop a column that only later rows have.
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return Dataset.from_list([{name: row.get(name) for name in names} for row in rows])
    except Exception as error:  # pyarrow raises its own types for columns of mixed types
        found = next((text for name in names if (text := _clash(rows, name))), f"({error})")
        raise ValueError(f"{source}: the rows do not form columns of one type each: {found}") from error


def _clash(rows: Sequence[dict[str, Any]], name: str) -> str:
    """The first two rows between which the JSON type of a column changes; "" if none does."""
    kinds = [(row["row_number"], _json_kind(row[name])) for row in rows if row.get(name) is not None]
    other = next((kind for kind in kinds if kind[1] != kinds[0][1]), None)
    return f"column {name!r} is {kinds[0][1]} in row {kinds[0][0]} and {other[1]} in row {other[0]}" if other else ""


def _json_kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _from_hub(config: DataConfig, split: str) -> LoadedRows:
    from datasets import load_dataset

    repo, subset = _HUB[config.name]
    dataset = load_dataset(repo, subset, split=split)
    dataset = dataset.add_column("row_number", list(range(1, len(dataset) + 1)))  # type: ignore[call-arg]
    return LoadedRows(dataset=dataset, description=f"{repo} ({split}) from the hub: {len(dataset)} rows", bad_rows=())


def _generated(config: DataConfig, split: str, why: str) -> LoadedRows:
    """GSM-style problems made by reasoning-gym: other numbers and names in 100 templates of GSM8K."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(
            f"data: {config.name} cannot be had and reasoning-gym, which makes problems like it, is not installed; "
            "expected a network, data.path=FILE.jsonl, or: pip install reasoning-gym"
        ) from error
    size = _NUM_GENERATED[split]
    rows = []
    # Problem i of an endless list is made from seed + i; its wording decides its split: the splits are disjoint.
    for i in range(20 * sum(_NUM_GENERATED.values())):
        if len(rows) == size:
            break
        problem = reasoning_gym.create_dataset("gsm_symbolic", size=1, seed=config.seed * 1_000_003 + i)[0]
        question = problem["question"].removesuffix(_GENERATED_SUFFIX)
        if _generated_split(question) == split:
            answer = str(problem["answer"])
            rows.append({config.prompt_column: question, config.answer_column: answer, "row_number": len(rows) + 1})
    description = f"NOT {config.name}: {size} generated problems like it (reasoning-gym gsm_symbolic), {why}"
    if split == "test":
        description = f"NOT {config.name}: {size} more generated problems, none of them among those for training"
    return LoadedRows(dataset=_dataset(rows, "reasoning-gym"), description=description, bad_rows=())


def _generated_split(question: str) -> str:
    return "test" if hashlib.sha256(question.encode()).digest()[0] % 5 == 0 else "train"
