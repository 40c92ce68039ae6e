"""Rows become prompts: selected, shuffled, rendered, tokenised, checked against the model's context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rlbench.config.schema import DataConfig
from rlbench.data.chat import chat_messages, question_text, render_all
from rlbench.data.sources import LoadedRows
from rlbench.records import Prompt

_TOGETHER = 256  # rows tokenised by one call


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    prompts: tuple[Prompt, ...]
    num_too_long: int  # left out


def select_rows(loaded: LoadedRows, *, limit: int | None, shuffle_seed: int | None) -> Any:
    """The rows to use: the first `limit`, after shuffling unless `shuffle_seed` is None."""
    dataset = loaded.dataset
    if shuffle_seed is not None:
        dataset = dataset.shuffle(seed=shuffle_seed)
    return dataset.select(range(min(limit, len(dataset)))) if limit is not None else dataset


def make_prompts(
    rows: Any, split: str, config: DataConfig, tokenizer: Any, *, max_prompt_tokens: int, limit_reason: str
) -> PromptSet:
    """Render and tokenise rows.

    Args:
        rows: a `datasets.Dataset` with a column "row_number".
        split: "train" or "test"; prompt ids are "<split>/<row_number>".
        config: the `data` part of the config.
        tokenizer: of the model.
        max_prompt_tokens: a longer prompt is an error or left out, as `data.long_prompts` says.
        limit_reason: how that number came about, for the error message.

    Raises:
        ValueError: a prompt is too long, or none is left.
    """
    prompts: list[Prompt] = []
    num_too_long = 0
    for row, (text, token_ids) in _rendered(rows, config, tokenizer):
        if len(token_ids) > max_prompt_tokens:
            if config.long_prompts == "error":
                raise ValueError(
                    f"row {row['row_number']} of the {split} data makes a prompt of {len(token_ids)} tokens, "
                    f"expected at most {max_prompt_tokens} ({limit_reason}); shorten it or set data.long_prompts=skip"
                )
            num_too_long += 1
            continue
        columns = {**row, "answer": row[config.answer_column]}
        prompt_id = f"{split}/{row['row_number']}"
        prompts.append(Prompt(prompt_id=prompt_id, text=text, token_ids=token_ids, columns=columns))
    if not prompts:
        raise ValueError(
            f"no prompt is left of the {split} data: all {num_too_long} are longer than {max_prompt_tokens} tokens"
        )
    return PromptSet(prompts=tuple(prompts), num_too_long=num_too_long)


def _rendered(
    rows: Any, config: DataConfig, tokenizer: Any
) -> Iterator[tuple[dict[str, Any], tuple[str, tuple[int, ...]]]]:  # fmt: skip
    """Each row, and text and token ids of its prompt."""
    rest = iter(rows)
    while some := list(islice(rest, _TOGETHER)):
        chats = [chat_messages(question_text(row, config), config) for row in some]
        yield from zip(some, render_all(chats, tokenizer), strict=True)


def prompt_limit(max_completion_tokens: int, context_tokens: int) -> tuple[int, str]:
    """Most tokens of a prompt, and how that number comes about.

    Args:
        max_completion_tokens: sampling.max_tokens.
        context_tokens: most tokens of a prompt and a completion.

    Raises:
        ValueError: completions leave no room for a prompt.
    """
    limit = context_tokens - max_completion_tokens
    if limit < 1:
        raise ValueError(
            f"sampling.max_tokens is {max_completion_tokens}, but the model's context is {context_tokens} "
            "tokens, prompt included; expected a smaller sampling.max_tokens"
        )
    return limit, f"the model's context of {context_tokens} less sampling.max_tokens of {max_completion_tokens}"


def longest_prompt_tokens(prompts: Sequence[Prompt]) -> int:
    return max(len(prompt.token_ids) for prompt in prompts)
