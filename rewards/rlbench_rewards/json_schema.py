"""Whether a completion is JSON that fits a JSON schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rlbench_rewards.contract import RewardError, RewardOutput, RewardSample, UnitCase, column
from rlbench_rewards.json_text import NotJson, fenced_json, whole_json

_MAX_SHOWN = 300


class JsonSchema:
    """1.0 if the completion is JSON that the schema allows, `partial` if it is other JSON, else 0.0.

    Args:
        schema: a JSON schema (draft 2020-12), the same for all rows; {} allows any JSON.
        schema_column: column with the row's schema (an object, or its text) instead.
        where: "whole", or "fenced" (the last ``` block, if there is one).
        partial: value of JSON that does not fit.

    Raises:
        ValueError: not exactly one of schema and schema_column, or a schema that is none.
    """

    def __init__(
        self,
        schema: Mapping[str, Any] | None = None,
        schema_column: str | None = None,
        where: str = "whole",
        partial: float = 0.0,
    ) -> None:
        if (schema is None) == (schema_column is None):
            raise ValueError("exactly one of schema and schema_column must be given")
        readers = {"whole": whole_json, "fenced": fenced_json}
        if where not in readers:
            raise ValueError(f"where is {where!r}, expected one of: {', '.join(readers)}")
        self._read = readers[where]
        self._column = schema_column
        self._partial = partial
        self._validator = None if schema is None else validator(schema)
        self.required_columns = () if schema_column is None else (schema_column,)

    def __call__(self, sample: RewardSample) -> RewardOutput:
        check = self._validator or self._of_row(sample)
        try:
            value = self._read(sample.completion.strip())
        except NotJson as error:
            return RewardOutput(value=0.0, details={"reason": str(error)})
        problem = next(check.iter_errors(value), None)
        if problem is not None:
            reason = f"{problem.json_path}: {problem.message}"[:_MAX_SHOWN]
            return RewardOutput(value=self._partial, details={"reason": reason})
        return RewardOutput(value=1.0)

    def unit_cases(self) -> list[UnitCase]:
        row = {self._column: {}} if self._column else {}
        return [UnitCase(completion=text, expected=0.0, columns=row) for text in ("", "no JSON", '{"a": 1', "{'a': 1}")]

    def _of_row(self, sample: RewardSample) -> Any:
        assert self._column is not None
        schema = column(sample, self._column)
        try:
            return validator(json.loads(schema) if isinstance(schema, str) else schema)
        except ValueError as error:
            raise RewardError(f"column {self._column!r} holds no JSON schema ({error})") from error


def validator(schema: Mapping[str, Any]) -> Any:
    """A checker for a schema; references stay inside of it, nothing is fetched.

    Raises:
        ValueError: jsonschema is not installed, or this is no schema.
    """
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
    except ImportError as error:
        raise ValueError("JSON schemas need the package jsonschema; expected: pip install jsonschema") from error
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"schema: {error.message}") from error
    return Draft202012Validator(schema)
