"""Which rows of an evaluation's data a run did not train on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlbench.config.schema import DataConfig, RunConfig

if TYPE_CHECKING:
    from rlbench.build import BaseInputs
    from rlbench.data.prompts import PromptSet


def hold_out(config: RunConfig, trained: RunConfig | None, run_folder: Path | None) -> list[str]:
    """Decide what the held-out rows are, in place; returns what a user should know of it.

    A file that the run trained on keeps the run's own split. Any other file that `data.path` names is held out whole.

    Args:
        config: of the evaluation, `data` changed in place.
        trained: what the run was trained with; None: nothing was trained.
        run_folder: of the run, for messages.

    Raises:
        ValueError: rows would be evaluated that the run trained on.
    """
    data = config.data
    if data.eval_path is not None:
        # The training rows are not needed, and their file may be gone.
        data.path = data.eval_path
        is_seen = trained is not None and _is_same_file(data.eval_path, trained.data.path)
        return [f"{run_folder} trained on rows of data.eval_path={data.eval_path}"] if is_seen else []
    if data.path is None:
        return []
    if trained is None or not _is_same_file(data.path, trained.data.path):
        data.eval_path = data.path
        return [f"all rows of data.path={data.path} are taken as held out"]
    num_held_out = _num_held_out(trained)
    if not num_held_out:
        raise ValueError(
            f"data.path is {data.path}, whose rows {run_folder} trained on, holding out none; expected held-out rows: "
            "data.eval_path=FILE.jsonl"
        )
    for name in ("seed", "shuffle"):
        if getattr(data, name) != getattr(trained.data, name):
            raise ValueError(
                f"data.{name} is {getattr(data, name)}, but {run_folder} chose its held-out rows of {data.path} with "
                f"{getattr(trained.data, name)}: others would be rows that it trained on; expected no data.{name}"
            )
    if (config.evaluation.num_prompts or 0) > num_held_out:
        raise ValueError(
            f"evaluation.num_prompts is {config.evaluation.num_prompts}, but {run_folder} held out at most "
            f"{num_held_out} rows of {data.path} and trained on the rest; expected at most "
            f"evaluation.num_prompts={num_held_out}, or data.eval_path=FILE.jsonl"
        )
    return []


def seen_by(trained: RunConfig, run_folder: Path, config: RunConfig) -> list[str]:
    """What to say where another run trained on rows that are evaluated; empty if it did not, as far as can be known.

    Args:
        trained: what the other run was trained with.
        run_folder: of the other run.
        config: of the evaluation, after `hold_out`.
    """
    place = config.data.eval_path or config.data.path
    if place is None or not _is_same_file(place, trained.data.path):
        return []
    has_own_split = config.data.eval_path is None
    is_same_split = _choice(trained.data) == _choice(config.data)
    if has_own_split and is_same_split and _num_held_out(trained) >= (config.evaluation.num_prompts or 0):
        return []
    return [f"{run_folder} trained on rows of {place} that are evaluated here"]


def held_out_prompts(basis: BaseInputs) -> PromptSet:
    """The prompts of an evaluation.

    Raises:
        ValueError: there are none, or as `make_prompts` and `prompt_limit`.
    """
    from rlbench.build import split_rows
    from rlbench.data.prompts import make_prompts, prompt_limit

    config = basis.config
    _, rows = split_rows(config, basis.rows)
    if rows is None or not len(rows):
        loaded = basis.rows.get("test", basis.rows["train"])
        share = "" if "test" in basis.rows else ", of which at most a fifth is held out"
        raise ValueError(
            f"there are no held-out prompts: {loaded.description}{share}; expected data.eval_path=FILE.jsonl"
        )
    limit, reason = prompt_limit(config.sampling.max_tokens, basis.context_tokens)
    return make_prompts(rows, "test", config.data, basis.tokenizer, max_prompt_tokens=limit, limit_reason=reason)


def describe_data(basis: BaseInputs, prompts: PromptSet) -> str:
    """Where the prompts come from and how many there are, in words."""
    loaded = basis.rows.get("test", basis.rows["train"])
    parts = [f"{loaded.description}; {len(prompts.prompts)} held-out prompts"]
    if "test" not in basis.rows:
        parts.append("those that the run held out")
    if prompts.num_too_long:
        parts.append(f"{prompts.num_too_long} more are too long and left out")
    return ", ".join(parts + _bad_rows(loaded.bad_rows))


def _bad_rows(bad_rows: Sequence[str]) -> list[str]:
    return [f"{len(bad_rows)} rows cannot be used and are left out"] if bad_rows else []


def _num_held_out(trained: RunConfig) -> int:
    """Rows at the start of its shuffled `data.path` that a run left out of its training; 0 if they are elsewhere."""
    return 0 if trained.data.eval_path is not None else trained.evaluation.num_prompts or 0


def _choice(data: DataConfig) -> tuple[int, bool]:
    return data.seed, data.shuffle


def _is_same_file(path: str, other: str | None) -> bool:
    return other is not None and Path(path).expanduser().resolve() == Path(other).expanduser().resolve()
