"""A data row becomes the text that the model sees."""

from __future__ import annotations

from typing import Any

from rlbench.config.schema import DataConfig


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
    if tokenizer.chat_template is None:
        text = "\n\n".join(message["content"] for message in messages) + "\n\n"
        return text, tuple(tokenizer(text)["input_ids"])
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself.
    return text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
