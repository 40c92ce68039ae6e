"""A data row becomes the text that the model sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlbench.config.schema import DataConfig


def question_text(row: Mapping[str, Any], config: DataConfig) -> str:
    """The prompt column, then each of `data.shown_columns` that is not empty, with blank lines between.

    Raises:
        ValueError: the row has no such column.
    """
    for column in config.shown_columns:
        if column not in row:
            raise ValueError(f"data.shown_columns names {column!r}, expected one of: {', '.join(map(str, row))}")
    shown = [row[column] for column in config.shown_columns]
    parts = ["\n".join(map(str, value)) if isinstance(value, list) else str(value) for value in shown if value]
    return "\n\n".join([str(row[config.prompt_column]), *parts])


def chat_messages(question: str, config: DataConfig) -> list[dict[str, str]]:
    """System prompt, solved examples as earlier turns, then the question in the prompt template."""

    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": config.prompt_template.replace("{prompt}", text)}

    messages = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    for example in config.examples:
        messages += [user(example.prompt), {"role": "assistant", "content": example.answer}]
    return [*messages, user(question)]


def render(messages: list[dict[str, str]], tokenizer: Any) -> tuple[str, tuple[int, ...]]:
    """Text and token ids of the messages with the model's chat template, ready for the answer.

    A model without a chat template gets the contents, one after the other, with blank lines between.
    """
    return render_all([messages], tokenizer)[0]


def render_all(
    conversations: Sequence[list[dict[str, str]]], tokenizer: Any
) -> list[tuple[str, tuple[int, ...]]]:  # fmt: skip
    """As `render`, many at once: several times faster, and the same tokens."""
    has_template = tokenizer.chat_template is not None
    if has_template:
        texts = [
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in conversations
        ]
    else:
        texts = ["\n\n".join(message["content"] for message in messages) + "\n\n" for messages in conversations]
    # A template writes the special tokens itself.
    ids = tokenizer(texts, add_special_tokens=not has_template, return_attention_mask=False)["input_ids"]
    return [(text, tuple(tokens)) for text, tokens in zip(texts, ids, strict=True)]
