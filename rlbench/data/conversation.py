"""Rows in TRL's formats, as token ids: plain texts and conversations, a prompt and what follows it.

The rules are TRL's: a plain text gets the end-of-sequence token, a conversation what its chat template writes; a
completion begins where the tokens of the prompt and those of prompt and completion part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

Messages = list[dict[str, Any]]
_CHATML = {"from": "role", "value": "content"}  # the older names of a message's parts
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", "observation")


def is_conversation(value: Any) -> bool:
    """A list of messages, under the names of either format."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return is_list and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in value)


def value_problem(name: str, value: Any, *, may_be_empty: bool = False) -> str:
    """What is wrong with a column that must be text or a conversation, "" if nothing is."""
    if isinstance(value, str):
        return "" if value or may_be_empty else f"column {name!r} is empty, expected text or a list of messages"
    if not is_conversation(value):
        return f"column {name!r} is {_short(value)}, expected text or a list of messages"
    for message in as_messages(value):
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            return f"column {name!r} has the message {_short(message)}, expected a role and a content that is text"
        if message.get("role") not in _ROLES:  # a turn of "gpt" would be trained on by nobody, without a word
            return f"column {name!r} has the role {message.get('role')!r}, expected one of: {', '.join(_ROLES)}"
    return ""


def completion_problem(name: str, value: Any) -> str:
    """What is wrong with a column that must follow a prompt, "" if nothing is."""
    problem = value_problem(name, value)
    if problem or isinstance(value, str):
        return problem
    role = as_messages(value)[0]["role"]
    if role in ("system", "developer", "user"):
        return f"column {name!r} begins with a turn of the {role}, expected what follows the prompt alone"
    return ""


def column_names(row: Mapping[str, Any]) -> str:
    """The columns of a row in words, those without a value marked."""
    return ", ".join(f"{name} (null)" if value is None else str(name) for name, value in row.items()) or "none"


def mixed_problem(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """Columns of one row are all texts or all conversations."""
    kinds = {name: "a conversation" if is_conversation(row[name]) else "text" for name in names}
    if len(set(kinds.values())) == 1:
        return ""
    return f"{', '.join(f'{name} is {kind}' for name, kind in kinds.items())}; expected one kind"


def as_messages(value: Sequence[Mapping[str, Any]]) -> Messages:
    """Messages with the keys role and content; what a table filled in with null is left out."""
    return [
        {_CHATML.get(key, key): part for key, part in message.items() if part is not None or key == "content"}
        for message in value
    ]


def conversation_ids(
    messages: Messages, row: Mapping[str, Any], tokenizer: Any, *, for_answer: bool = False
) -> list[int]:
    """Token ids of `conversation_text`, with its arguments and errors."""
    return _ids(conversation_text(messages, row, tokenizer, for_answer=for_answer), tokenizer)


def conversation_text(messages: Messages, row: Mapping[str, Any], tokenizer: Any, *, for_answer: bool = False) -> str:
    """A conversation as text; the row's columns `tools` and `chat_template_kwargs` go to the template.

    Args:
        for_answer: end with what begins the assistant's turn.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    from jinja2.exceptions import TemplateError

    if tokenizer.chat_template is None:
        raise ValueError("the model's tokenizer has no chat template, so conversations have no text; expected texts")
    tools = row.get("tools")
    options = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_answer, **options)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation ({error})") from error


def completion_ids(
    prompt: Any, completions: Sequence[Any], row: Mapping[str, Any], tokenizer: Any
) -> tuple[list[int], list[list[int]]]:
    """Tokens of a prompt and of each of its completions.

    Args:
        prompt: text or messages.
        completions: of the prompt, of the same kind.
        row: that they are from.
        tokenizer: of the model.

    Returns:
        The prompt up to where the first completion parts from it, and the rest of each.

    Raises:
        ValueError: as `conversation_ids`.
    """
    if is_conversation(completions[0]):
        before = as_messages(prompt)
        prompt_ids = conversation_ids(before, row, tokenizer, for_answer=True)
        wholes = [conversation_ids([*before, *as_messages(c)], row, tokenizer) for c in completions]
    else:
        prompt_ids = list(tokenizer(prompt)["input_ids"])
        wholes = [list(tokenizer(prompt + with_end(c, tokenizer))["input_ids"]) for c in completions]
    shared = min(common_prefix(prompt_ids, whole) for whole in wholes)
    return prompt_ids[:shared], [whole[shared:] for whole in wholes]


def assistant_mask(messages: Messages, row: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and True on those that an assistant's turn consists of.

    A turn's tokens are those that rendering it adds to the conversation so far with the opening of the turn.

    Raises:
        ValueError: the template writes a turn otherwise when later ones follow; or as `conversation_ids`.
    """
    whole = conversation_ids(messages, row, tokenizer)
    mask = [False] * len(whole)
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        if i:
            opening = conversation_ids(messages[:i], row, tokenizer, for_answer=True)
        else:
            opening = _first_opening(message, row, tokenizer)
        turn = conversation_ids(messages[: i + 1], row, tokenizer)
        start, end = common_prefix(opening, whole), common_prefix(turn, whole)
        if end < len(turn):
            raise ValueError(
                f"the chat template writes turn {i + 1} otherwise when later turns follow, so its tokens are unknown; "
                "expected one row for each turn, with prompt and completion, or sft.loss_on=all"
            )
        mask[start:end] = [True] * (end - start)
    return whole, mask


def _first_opening(message: Mapping[str, Any], row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """Token ids before what the assistant says in a conversation that its turn begins.

    Few templates render a conversation without turns. So this is what the turn has in common with one that says
    something else, up to the end of what opens an answer after a question, if that is in it.
    """
    other = "B" if str(message.get("content")).strip().startswith("A") else "A"
    turns = [dict(message), {"role": "assistant", "content": other}]
    shared = os.path.commonprefix([conversation_text([turn], row, tokenizer) for turn in turns])
    question: Messages = [{"role": "user", "content": "A"}]
    asked = conversation_text(question, row, tokenizer)
    header = conversation_text(question, row, tokenizer, for_answer=True).removeprefix(asked)
    start = shared.rfind(header)
    return _ids(shared if start < 0 else shared[: start + len(header)], tokenizer)


def _ids(text: str, tokenizer: Any) -> list[int]:
    """Of a text whose special tokens the template has written."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def with_end(text: str, tokenizer: Any) -> str:
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens are equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
