"""Rows with given completions become training samples: TRL's formats, and rows with a question and an answer.

| columns | what is trained on (sft.loss_on=completion) |
|---|---|
| prompt, completion (texts or conversations) | the completion |
| messages or conversations | every turn of the assistant |
| text | everything |
| data.prompt_column, data.answer_column | the answer, after the prompt that the online loop would show |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlbench.config.schema import DataConfig
from rlbench.data.chat import chat_messages, question_text, render
from rlbench.data.conversation import (
    as_messages,
    assistant_mask,
    column_names,
    completion_ids,
    completion_problem,
    conversation_ids,
    is_conversation,
    mixed_problem,
    value_problem,
    with_end,
)
from rlbench.data.sources import answer_problem
from rlbench.records import TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSet:
    samples: tuple[TrainingSample, ...]
    num_too_long: int  # left out
    format: str  # columns that were read

    @property
    def longest_tokens(self) -> int:
        return max(len(sample.prompt_token_ids) + len(sample.token_ids) for sample in self.samples)


def supervised_format(columns: Mapping[str, Any], config: DataConfig) -> tuple[str, ...] | None:
    """The columns that a row is read by: those that data.* names, if they are not the defaults, before TRL's.

    None if it has no format.
    """
    formats = [("prompt", "completion"), ("messages",), ("conversations",), ("text",)]
    own, default = (config.prompt_column, config.answer_column), DataConfig()
    is_asked_for = own != (default.prompt_column, default.answer_column)
    formats.insert(0 if is_asked_for else len(formats), own)
    return next((names for names in formats if all(columns.get(name) is not None for name in names)), None)


def supervised_problem(row: dict[str, Any], config: DataConfig) -> str:
    """What is wrong with a row of a file, "" if nothing is."""
    names = supervised_format(row, config)
    if names is None:
        return (
            f"it has the columns {column_names(row)}, expected prompt and completion, messages, text, "
            f"or {config.prompt_column} and {config.answer_column} (data.prompt_column, data.answer_column)"
        )
    if names == (config.prompt_column, config.answer_column) and names != ("prompt", "completion"):
        return answer_problem(row, config)
    for name in names:
        if name in ("messages", "conversations") and not is_conversation(row[name]):
            return f"column {name!r} is no list of messages with role and content"
        problem = (
            completion_problem(name, row[name])
            if name == "completion"
            else value_problem(name, row[name], may_be_empty=name == "prompt")
        )
        if problem:
            return problem
    return mixed_problem(row, names)


def make_samples(
    rows: Any, split: str, config: DataConfig, tokenizer: Any, *, loss_on: str, max_tokens: int, limit_reason: str
) -> SampleSet:
    """Render and tokenise rows.

    Args:
        rows: a `datasets.Dataset` with a column "row_number".
        split: "train" or "test"; sample ids are "<split>/<row_number>".
        config: the `data` part of the config.
        tokenizer: of the model.
        loss_on: sft.loss_on.
        max_tokens: a longer row is an error or left out, as `data.long_prompts` says.
        limit_reason: how that number came about, for the error message.

    Raises:
        ValueError: a row cannot be rendered, nothing in it can be trained on, it is too long, or none is left.
    """
    samples: list[TrainingSample] = []
    num_too_long = 0
    formats: dict[tuple[str, ...], None] = {}
    for row in rows:
        names = supervised_format(row, config)
        assert names is not None, row
        formats[names] = None
        check_prompt_settings(names, config)
        where = f"row {row['row_number']} of the {split} data"
        try:
            token_ids, mask = _tokens(row, names, config, tokenizer, loss_on)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not any(mask[1:]):
            raise ValueError(f"{where} has nothing to train on: {len(token_ids)} tokens, none of them after a prompt")
        if len(token_ids) > max_tokens:
            check_long(where, len(token_ids), max_tokens, limit_reason, config)
            num_too_long += 1
            continue
        samples.append(given_sample(f"{split}/{row['row_number']}", token_ids, mask))
    if not samples:
        raise ValueError(f"no row is left of the {split} data: all {num_too_long} are longer than {max_tokens} tokens")
    described = "; ".join(" and ".join(names) for names in formats)
    return SampleSet(samples=tuple(samples), num_too_long=num_too_long, format=described)


def check_prompt_settings(names: Sequence[str], config: DataConfig) -> None:
    """
    Raises:
        ValueError: a setting that makes prompts is set, but the rows of this format carry theirs.
    """
    if tuple(names) == (config.prompt_column, config.answer_column) and tuple(names) != ("prompt", "completion"):
        return
    default = DataConfig()
    for key in ("system_prompt", "prompt_template", "examples"):
        if getattr(config, key) != getattr(default, key):
            raise ValueError(
                f"data.{key} is set, but rows with the columns {' and '.join(names)} hold whole prompts; expected its "
                "default (data=file sets none)"
            )


def check_long(where: str, length: int, limit: int, limit_reason: str, config: DataConfig) -> None:
    """
    Raises:
        ValueError: unless `data.long_prompts` is skip.
    """
    if config.long_prompts == "error":
        raise ValueError(
            f"{where} has {length} tokens, expected at most {limit} ({limit_reason}); shorten it or set "
            "data.long_prompts=skip"
        )


def given_sample(sample_id: str, token_ids: Sequence[int], mask: Sequence[bool]) -> TrainingSample:
    """A sequence cut in front of its first trained token. No engine sampled it, and no credit is given."""
    start = max(1, list(mask).index(True))
    length = len(token_ids) - start
    return TrainingSample(
        group_id=sample_id,
        prompt_token_ids=tuple(token_ids[:start]),
        token_ids=tuple(token_ids[start:]),
        sampling_logprobs=(0.0,) * length,
        advantages=(0.0,) * length,
        loss_mask=tuple(mask[start:]),
    )


def answer_ids(row: Mapping[str, Any], config: DataConfig, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Of a row with a question: the online loop's prompt, and the answer as an engine would end it."""
    messages, answer = chat_messages(question_text(row, config), config), str(row[config.answer_column])
    prompt_ids = list(render(messages, tokenizer)[1])
    return prompt_ids, continue_ids(messages, prompt_ids, answer, row, tokenizer)


def continue_ids(
    messages: list[dict[str, str]], prompt_ids: list[int], answer: str, row: Mapping[str, Any], tokenizer: Any
) -> list[int]:
    """The answer's tokens after the rendered prompt, ending with the end-of-sequence token."""
    if tokenizer.chat_template is None:
        return list(tokenizer(with_end(answer, tokenizer), add_special_tokens=False)["input_ids"])
    reply = [{"role": "assistant", "content": answer}]
    before, (after,) = completion_ids(messages, [reply], row, tokenizer)
    if len(before) < len(prompt_ids):
        raise ValueError(
            "the chat template writes the prompt otherwise when an answer follows; expected rows with prompt and "
            "completion as texts"
        )
    end = tokenizer.eos_token_id
    return [*after[: after.index(end)], end] if end in after else [*after, end]


def _tokens(
    row: Mapping[str, Any], names: tuple[str, ...], config: DataConfig, tokenizer: Any, loss_on: str
) -> tuple[list[int], list[bool]]:
    """Token ids of a row, and True on those that are trained on."""
    if names == ("prompt", "completion"):
        prompt, (completion,) = completion_ids(row["prompt"], [row["completion"]], row, tokenizer)
    elif names in (("messages",), ("conversations",)):
        messages = as_messages(row[names[0]])
        if loss_on == "completion":
            return assistant_mask(messages, row, tokenizer)
        prompt, completion = [], conversation_ids(messages, row, tokenizer)
    elif names == ("text",):
        prompt, completion = [], list(tokenizer(with_end(row["text"], tokenizer))["input_ids"])
    else:
        prompt, completion = answer_ids(row, config, tokenizer)
    return [*prompt, *completion], [loss_on == "all"] * len(prompt) + [True] * len(completion)
