"""What was said so far, as the prompt of the next answer: the run's system prompt, examples, template, then the turns.

Where two policies answer, each is shown its own earlier answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlbench.config.schema import DataConfig, RunConfig
from rlbench.records import Completion, Prompt

FREE = "chat"  # prompt_id of what no data row asks


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a user's turn asks.

    Example:
        Question(text="What is 2 + 2?")
    """

    text: str  # before data.prompt_template
    prompt_id: str = FREE
    columns: Mapping[str, Any] | None = None  # of the data row; None: there is no gold answer


@dataclass(slots=True, kw_only=True)
class Turn:
    question: Question
    answers: dict[str, str] = field(default_factory=dict)  # by side


class Conversation:
    """The turns, and what stands before them."""

    def __init__(self, data: DataConfig, tokenizer: Any) -> None:
        """
        Args:
            data: whose system prompt, examples and template are used.
            tokenizer: of the model.
        """
        self._data = data
        self._tokenizer = tokenizer
        self.turns: list[Turn] = []

    @property
    def system_prompt(self) -> str | None:
        return self._data.system_prompt

    def set_system_prompt(self, text: str | None) -> None:
        """For all answers to come; None: there is none."""
        self._data = replace(self._data, system_prompt=text)

    def prompt(self, question: Question, side: str) -> Prompt:
        """The whole conversation with `question` at its end, ready for the answer of `side`.

        Raises:
            ValueError: the chat template refuses it.
        """
        from jinja2.exceptions import TemplateError

        from rlbench.data.chat import render

        try:
            text, token_ids = render(self._messages(question, side), self._tokenizer)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation ({error}); /new starts again") from error
        return Prompt(
            prompt_id=question.prompt_id, text=text, token_ids=token_ids, columns=dict(question.columns or {})
        )

    def text_of(self, completion: Completion) -> str:
        """What a completion adds to the conversation; special tokens are left out."""
        return self._tokenizer.decode(completion.token_ids, skip_special_tokens=True)

    def _messages(self, question: Question, side: str) -> list[dict[str, str]]:
        from rlbench.data.chat import chat_messages

        follow_up = replace(self._data, system_prompt=None, examples=[])
        messages: list[dict[str, str]] = []
        for turn in self.turns:
            messages += chat_messages(turn.question.text, follow_up if messages else self._data)
            messages.append({"role": "assistant", "content": turn.answers[side]})
        return messages + chat_messages(question.text, follow_up if messages else self._data)


class HeldOutProblems:
    """The held-out problems of a run, read when the first is asked for."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._rows: Any = None

    def question(self, number: str) -> Question:
        """The problem of that number, from 1.

        Raises:
            ValueError: there is no such problem, or the rows cannot be read.
        """
        from rlbench.data.chat import question_text

        if self._rows is None:
            self._rows = self._read()
        if not (number.isascii() and number.isdigit() and 1 <= int(number) <= len(self._rows)):
            raise ValueError(f"/problem is followed by {number or 'nothing'}, expected 1 to {len(self._rows)}")
        row = self._rows[int(number) - 1]
        data = self._config.data
        return Question(
            text=question_text(row, data),
            prompt_id=f"test/{row['row_number']}",
            columns={**row, "answer": row[data.answer_column]},
        )

    def _read(self) -> Any:
        from rlbench.build import read_rows, split_rows
        from rlbench.data.sources import check_paths

        check_paths(self._config.data)
        _, held_out = split_rows(self._config, read_rows(self._config))
        if held_out is None or not len(held_out):
            raise ValueError(
                f"/problem: the run holds no problems out (evaluation.num_prompts is "
                f"{self._config.evaluation.num_prompts}); expected a run with evaluation.num_prompts above 0, or that "
                "setting for chat"
            )
        return held_out
