"""Rows of code data sets, each with a right program, and the same judgement by plain execution.

The tasks of HumanEval's and MBPP's form are modules of functions: `name` and `check_name`. What a row's prompt begins
with, imports and functions without a check, is what its function or its check mentions.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
_METADATA = "\n\nMETADATA = {\n    'author': 'us',\n}\n\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A row and a program that solves it."""

    name: str
    row: Mapping[str, Any]
    program: str
    function: str  # the one to change for a mutant; "": the whole program
    judged: Callable[[str], str]  # a program, to code that raises unless it passes the row's tests


def human_eval_problem(row: Mapping[str, Any]) -> Problem:
    """Of a row with HumanEval's columns."""
    name = row["entry_point"]
    return Problem(
        name=str(row.get("task_id", name)),
        row=row,
        program=row["prompt"] + row["canonical_solution"],
        function=name,
        judged=lambda program: f"{program}\n\n{row['test']}\n\ncheck({name})\n",
    )


def mbpp_problem(row: Mapping[str, Any], function: str = "") -> Problem:
    """Of a row with MBPP's columns."""
    tests = "\n".join([*row["test_list"], *row.get("challenge_test_list", ())])
    return Problem(
        name=str(row["task_id"]),
        row=row,
        program=row["code"],
        function=function,
        judged=lambda program: f"{program}\n\n{row.get('test_setup_code') or ''}\n{tests}\n",
    )


def human_eval_rows(module: str) -> list[dict[str, Any]]:
    """The tasks of a module in this folder, with HumanEval's columns."""
    rows = []
    for task in _tasks(module):
        body = task.function.body
        cut = body[0].end_lineno or 0
        rows.append(
            {
                "task_id": f"{module}/{task.function.name}",
                "prompt": task.context + "\n".join(task.lines[task.function.lineno - 1 : cut]) + "\n",
                "entry_point": task.function.name,
                "canonical_solution": "\n".join(task.lines[cut : task.function.end_lineno]) + "\n",
                "test": _METADATA + task.check_source.replace(f"def check_{task.function.name}(", "def check(", 1),
            }
        )
    return rows


def mbpp_rows(module: str) -> list[dict[str, Any]]:
    """The tasks of a module in this folder, with MBPP's columns; a check's first three assertions are shown."""
    rows = []
    for task in _tasks(module):
        asserts = [ast.unparse(node).replace("candidate(", f"{task.function.name}(") for node in task.check.body]
        function = "\n".join(task.lines[task.function.lineno - 1 : task.function.end_lineno])
        rows.append(
            {
                "task_id": f"{module}/{task.function.name}",
                "text": ast.get_docstring(task.function),
                "code": task.context + function + "\n",
                "test_list": asserts[:3],
                "test_setup_code": "",
                "challenge_test_list": asserts[3:],
            }
        )
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    function: ast.FunctionDef
    check: ast.FunctionDef
    context: str  # source in front of the function
    lines: list[str]  # of the module

    @property
    def check_source(self) -> str:
        return "\n".join(self.lines[self.check.lineno - 1 : self.check.end_lineno]) + "\n"


def _tasks(module: str) -> list[_Task]:
    source = (_FOLDER / f"{module}.py").read_text()
    tree, lines = ast.parse(source), source.split("\n")
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    helpers = [f for name, f in functions.items() if not name.startswith("check_") and f"check_{name}" not in functions]
    tasks = []
    for name, function in functions.items():
        check = functions.get(f"check_{name}")
        if check is None:
            continue
        mentioned = _names(function) | _names(check)
        needed = [helper for helper in helpers if helper.name in mentioned]
        of_prompt = set.union(_names(function), *map(_names, needed))
        nodes = [node for node in imports if any((a.asname or a.name) in of_prompt for a in node.names)] + needed
        parts = ["\n".join(lines[node.lineno - 1 : node.end_lineno]) + "\n\n" for node in nodes]
        tasks.append(_Task(function=function, check=check, context="".join(parts), lines=lines))
    return tasks


def _names(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
