"""Whether the tool calls in a completion are valid, and whether they are the wanted ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlbench_rewards.contract import RewardError, RewardOutput, RewardSample, UnitCase, column
from rlbench_rewards.json_schema import validator
from rlbench_rewards.json_text import NotJson, whole_json

_MAX_CALLS = 50


class ToolCalls:
    """1.0 if every call names a known tool with arguments that fit its schema (and the calls are the wanted ones).

    Calls are `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. A completion without a call scores 0.0.

    Args:
        tools: descriptions in OpenAI's form, {"name", "parameters"} or {"function": {...}}.
        tools_column: column with the row's tools (a list, or its text) instead.
        wanted_column: column with the list of calls that must be made, in order; null: any valid ones.
        opening, closing: marks of a call.

    Raises:
        ValueError: not exactly one of tools and tools_column, or a tool without a name or a schema.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tools_column: str | None = None,
        wanted_column: str | None = None,
        opening: str = "<tool_call>",
        closing: str = "</tool_call>",
    ) -> None:
        if (tools is None) == (tools_column is None):
            raise ValueError("exactly one of tools and tools_column must be given")
        self._validators = None if tools is None else _validators(tools)
        self._tools_column, self._wanted_column = tools_column, wanted_column
        self._opening, self._closing = opening, closing
        self.needs_right_answer = wanted_column is not None
        self.required_columns = tuple(name for name in (tools_column, wanted_column) if name)

    def __call__(self, sample: RewardSample) -> RewardOutput:
        validators = self._validators or self._of_row(sample)
        try:
            calls = self._calls(sample.completion)
            for call in calls:
                _check_call(call, validators)
        except NotJson as error:
            return RewardOutput(value=0.0, details={"reason": str(error)})
        if self._wanted_column is None:
            return RewardOutput(value=1.0, details={"num_calls": len(calls)})
        wanted = _as_list(column(sample, self._wanted_column), self._wanted_column)
        if [_plain(call) for call in calls] == [_plain(call) for call in wanted]:
            return RewardOutput(value=1.0, details={"num_calls": len(calls)})
        return RewardOutput(value=0.0, details={"reason": "valid calls, but not the wanted ones"})

    def gold_completion(self, sample: RewardSample) -> str | None:
        """The wanted calls; None where none are wanted."""
        if self._wanted_column is None:
            return None
        wanted = _as_list(column(sample, self._wanted_column), self._wanted_column)
        return "\n".join(f"{self._opening}{json.dumps(call)}{self._closing}" for call in wanted)

    def unit_cases(self) -> list[UnitCase]:
        row = {name: [] for name in self.required_columns}
        unknown = json.dumps({"name": "a tool that is not there", "arguments": {}})
        texts = ["", "no call", f"{self._opening}{{{self._closing}", f"{self._opening}{unknown}{self._closing}"]
        return [UnitCase(completion=text, expected=0.0, columns=row) for text in texts]

    def _calls(self, text: str) -> list[Any]:
        pieces = text.split(self._opening)[1:]
        if not pieces:
            raise NotJson("no tool call")
        if len(pieces) > _MAX_CALLS:
            raise NotJson(f"more than {_MAX_CALLS} tool calls")
        if any(self._closing not in piece for piece in pieces):
            raise NotJson(f"a tool call without {self._closing}")
        return [whole_json(piece.split(self._closing, 1)[0].strip()) for piece in pieces]

    def _of_row(self, sample: RewardSample) -> dict[str, Any]:
        assert self._tools_column is not None
        try:
            return _validators(_as_list(column(sample, self._tools_column), self._tools_column))
        except ValueError as error:
            raise RewardError(f"column {self._tools_column!r}: {error}") from error


def _validators(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = {}
    for tool in tools:
        function = tool.get("function", tool)
        if not isinstance(function.get("name"), str):
            raise ValueError(f"a tool has no name: {json.dumps(tool, default=str)[:200]}")
        found[function["name"]] = validator(function.get("parameters") or {"type": "object"})
    return found


def _check_call(call: Any, validators: Mapping[str, Any]) -> None:
    if not isinstance(call, dict) or set(call) - {"id", "type"} != {"name", "arguments"}:
        raise NotJson("a call that is no object with name and arguments")
    if call["name"] not in validators:
        raise NotJson(f"there is no tool {call['name']!r}")
    problem = next(validators[call["name"]].iter_errors(call["arguments"]), None)
    if problem is not None:
        raise NotJson(f"{call['name']}: {problem.json_path}: {problem.message}"[:300])


def _plain(call: Mapping[str, Any]) -> tuple[Any, Any]:
    return call.get("name"), call.get("arguments")


def _as_list(value: Any, name: str) -> list[Any]:
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RewardError(f"column {name!r} holds no JSON ({error})") from error
    if not isinstance(parsed, list):
        raise RewardError(f"column {name!r} holds a {type(parsed).__name__}, expected a list")
    return parsed
