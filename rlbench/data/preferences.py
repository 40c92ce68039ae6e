"""Rows of preferences as token ids: TRL's formats, and pairs made from questions whose answer holds a number.

| columns | what a row is |
|---|---|
| prompt, chosen, rejected (texts or conversations) | a pair |
| chosen, rejected | a pair whose prompt is what both begin with |
| prompt, completion, label | a single completion, good (true) or bad; for unpaired losses |
| data.prompt_column, data.answer_column | a pair: the answer, and the answer with its last number changed |

For an unpaired loss a pair is two single completions. A reward model reads a pair's column margin too.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlbench.config.schema import DataConfig
from rlbench.data.chat import chat_messages, question_text, render
from rlbench.data.conversation import (
    column_names,
    completion_ids,
    completion_problem,
    is_conversation,
    mixed_problem,
    value_problem,
)
from rlbench.data.sources import answer_problem
from rlbench.data.supervised import check_long, check_prompt_settings, continue_ids
from rlbench.records import TrainingSample

_NUMBER = re.compile(r"\d+(?!.*\d)", re.DOTALL)  # the last one


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceRow:
    """Completions of one prompt that a loss compares.

    `completions` are (chosen, rejected) of a pair. Of an unpaired loss they are (completion, mismatched), where the
    second belongs to another row and `is_desirable` is the first one's label.
    """

    row_id: str
    prompt_token_ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], tuple[int, ...]]
    is_desirable: bool | None = None  # None: a pair
    margin: float = 0.0  # of a pair, for reward models: by how much the chosen one must win

    def samples(self, *indices: int) -> list[TrainingSample]:
        """The completions of these indices as samples of one group: their prompt is packed once."""
        return [_sample(self.row_id, self.prompt_token_ids, self.completions[index]) for index in indices]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceSet:
    rows: tuple[PreferenceRow, ...]
    num_too_long: int  # left out
    format: str  # columns that were read

    @property
    def longest_tokens(self) -> int:
        """Of a prompt with both completions."""
        return max(_packed_tokens(row.prompt_token_ids, row.completions) for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Labelled:
    row_id: str
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    is_desirable: bool


def preference_format(columns: Mapping[str, Any], config: DataConfig) -> tuple[str, ...] | None:
    """The columns that a row is read by; None if it has no format."""
    formats = [("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("prompt", "completion", "label")]
    formats.append((config.prompt_column, config.answer_column))
    return next((names for names in formats if all(columns.get(name) is not None for name in names)), None)


def preference_problem(
    row: dict[str, Any], config: DataConfig, *, is_unpaired: bool, reads_margin: bool = False
) -> str:
    """What is wrong with a row of a file, "" if nothing is."""
    margin = row.get("margin") if reads_margin else None
    if margin is not None and not _is_number(margin):
        return f"column 'margin' is {margin!r}, expected a number or nothing"
    names = preference_format(row, config)
    if names is None:
        return (
            f"it has the columns {column_names(row)}, expected prompt, chosen and rejected; chosen "
            f"and rejected; prompt, completion and label; or {config.prompt_column} and {config.answer_column}"
        )
    if names == (config.prompt_column, config.answer_column):
        problem = answer_problem(row, config)
        has_number = _NUMBER.search(str(row[config.answer_column]))
        return problem or ("" if has_number else f"column {config.answer_column!r} holds no number that could be wrong")
    texts = [name for name in names if name != "label"]
    for name in texts:
        follows = name != "prompt" and "prompt" in names
        problem = (
            completion_problem(name, row[name])
            if follows
            else value_problem(name, row[name], may_be_empty=name == "prompt")
        )
        if problem:
            return problem
    if "label" in names:
        if not isinstance(row["label"], bool):
            return f"column 'label' is {row['label']!r}, expected true or false"
        if not is_unpaired:
            return "it is a single completion with a label, which kto and apo_zero_unpaired alone can read"
    elif row["chosen"] == row["rejected"]:
        return "chosen and rejected are equal"
    return mixed_problem(row, texts)


def make_preferences(
    rows: Any,
    split: str,
    config: DataConfig,
    tokenizer: Any,
    *,
    is_unpaired: bool,
    reads_margin: bool = False,
    max_tokens: int,
    max_packed_tokens: int,
    limit_reason: str,
) -> PreferenceSet:
    """Render and tokenise rows.

    Args:
        rows: a `datasets.Dataset` with a column "row_number".
        split: "train" or "test"; row ids are "<split>/<row_number>".
        config: the `data` part of the config.
        tokenizer: of the model.
        is_unpaired: the loss reads single completions.
        reads_margin: take a pair's column margin over, where it has one.
        max_tokens: of a prompt with one completion; a longer row is an error or left out, as `data.long_prompts` says.
        max_packed_tokens: of a prompt with both completions, which share it; treated alike.
        limit_reason: how these numbers came about, for the error message.

    Raises:
        ValueError: a row cannot be rendered, has no prompt, is too long, or none is left.
    """
    pairs: list[PreferenceRow] = []
    labelled: list[_Labelled] = []
    num_too_long = 0
    formats: dict[tuple[str, ...], None] = {}
    for row in rows:
        names = preference_format(row, config)
        assert names is not None, row
        formats[names] = None
        check_prompt_settings(names, config)
        where, row_id = f"row {row['row_number']} of the {split} data", f"{split}/{row['row_number']}"
        try:
            prompt, completions = _tokens(row, names, config, tokenizer)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not prompt or not all(completions):
            raise ValueError(
                f"{where} has {'no prompt' if not prompt else 'an empty completion'}, expected some tokens"
            )
        longest = len(prompt) + max(map(len, completions))
        packed = 0 if is_unpaired else _packed_tokens(prompt, completions)
        if longest > max_tokens or packed > max_packed_tokens:
            shown, limit = (longest, max_tokens) if longest > max_tokens else (packed, max_packed_tokens)
            check_long(where, shown, limit, limit_reason, config)
            num_too_long += 1
        elif is_unpaired:
            labelled += _label(row_id, row, names, prompt, completions)
        else:
            pairs.append(
                PreferenceRow(
                    row_id=row_id,
                    prompt_token_ids=prompt,
                    completions=(completions[0], completions[1]),
                    margin=float(row.get("margin") or 0.0) if reads_margin else 0.0,
                )
            )
    found = pairs or [*_with_mismatch(labelled, max_tokens, split)]
    if not found:
        raise ValueError(f"no row is left of the {split} data: all {num_too_long} are longer than {max_tokens} tokens")
    described = "; ".join(" and ".join(names) for names in formats)
    labels = {row.is_desirable for row in labelled}
    if len(labels) == 1:
        described += f" (all labels are {str(*labels).lower()}: the loss has nothing to tell them from)"
    return PreferenceSet(rows=tuple(found), num_too_long=num_too_long, format=described)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """What texts or conversations begin with alike, and the rest of each; a space in between goes with the rest.

    If one begins with the whole of the other, its last character or message is not taken for the prompt.
    """
    shorter = min(len(chosen), len(rejected))
    start = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if start is None:
        start = shorter - 1
    elif start > 0 and chosen[start - 1] == " ":
        start -= 1
    return chosen[:start], chosen[start:], rejected[start:]


def wrong_answer(answer: str, row_id: str) -> str:
    """The answer with its last whole number changed by 1 to 9, which of them is a function of the row's id."""
    step = hashlib.sha256(row_id.encode()).digest()[0] % 9 + 1
    return _NUMBER.sub(lambda match: str(int(match.group()) + step), answer, count=1)


def _tokens(
    row: Mapping[str, Any], names: tuple[str, ...], config: DataConfig, tokenizer: Any
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The prompt's tokens, and those of each completion of the row."""
    if names == (config.prompt_column, config.answer_column):
        messages, answer = chat_messages(question_text(row, config), config), str(row[config.answer_column])
        ids = list(render(messages, tokenizer)[1])
        texts = [answer, wrong_answer(answer, str(row["row_number"]))]
        return tuple(ids), [tuple(continue_ids(messages, ids, text, row, tokenizer)) for text in texts]
    if "label" in names:
        parts = [row["prompt"], row["completion"]]
    elif "prompt" in names:
        parts = [row["prompt"], row["chosen"], row["rejected"]]
    else:
        parts = [*split_prompt(row["chosen"], row["rejected"])]
    if is_conversation(parts[1]) and not parts[0]:
        return (), [(0,)]
    prompt, completions = completion_ids(parts[0], parts[1:], row, tokenizer)
    return tuple(prompt), [tuple(ids) for ids in completions]


def _label(
    row_id: str, row: Mapping[str, Any], names: tuple[str, ...], prompt: tuple[int, ...], completions: Sequence[Any]
) -> Iterator[_Labelled]:
    if "label" in names:
        yield _Labelled(row_id=row_id, prompt=prompt, completion=completions[0], is_desirable=bool(row["label"]))
        return
    for kind, completion in zip(("chosen", "rejected"), completions, strict=True):
        yield _Labelled(row_id=f"{row_id}/{kind}", prompt=prompt, completion=completion, is_desirable=kind == "chosen")


def _with_mismatch(labelled: Sequence[_Labelled], max_tokens: int, split: str) -> Iterator[PreferenceRow]:
    """Each completion beside the nearest earlier one of another prompt that fits (the first ones: from the end)."""
    for index, own in enumerate(labelled):
        others = (labelled[index - offset] for offset in range(1, len(labelled)))
        fits = (o for o in others if o.prompt != own.prompt and len(own.prompt) + len(o.completion) <= max_tokens)
        other = next(fits, None)
        if other is None:
            raise ValueError(
                f"the {split} data has no completion of another prompt that fits after that of {own.row_id}; expected "
                "rows with at least two prompts"
            )
        yield PreferenceRow(
            row_id=own.row_id,
            prompt_token_ids=own.prompt,
            completions=(own.completion, other.completion),
            is_desirable=own.is_desirable,
        )


def _packed_tokens(prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> int:
    return len(prompt) + sum(len(ids) - 1 for ids in completions)


def _sample(row_id: str, prompt: tuple[int, ...], completion: tuple[int, ...]) -> TrainingSample:
    length = len(completion)
    return TrainingSample(
        group_id=row_id,
        prompt_token_ids=prompt,
        token_ids=completion,
        sampling_logprobs=(0.0,) * length,
        advantages=(0.0,) * length,
        loss_mask=(True,) * length,
    )
