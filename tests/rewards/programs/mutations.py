"""A right program made wrong in one place, systematically: an operator, a constant, a condition, a statement."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

KINDS = ("operator", "comparison", "logic", "constant", "condition", "dropped statement")
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_KEPT = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal)


@dataclass(frozen=True, slots=True)
class Mutant:
    kind: str  # one of KINDS
    change: str  # its first line that differs, "while n > 9: -> while n >= 9:"
    program: str


@dataclass(frozen=True, slots=True)
class _Edit:
    """`owner.field`, or its item `index`, becomes `new`."""

    kind: str
    owner: ast.AST
    field: str
    new: Any
    index: int | None = None

    def apply(self) -> None:
        if self.index is None:
            setattr(self.owner, self.field, self.new)
        else:
            getattr(self.owner, self.field)[self.index] = self.new


def mutants(program: str, function: str = "") -> list[Mutant]:
    """All programs with one change within the function, or anywhere if none is named; each text occurs once."""
    before = ast.unparse(ast.parse(program))
    found: dict[str, Mutant] = {}
    for number in range(len(_edits(ast.parse(program), function))):
        tree = ast.parse(program)
        edit = _edits(tree, function)[number]
        edit.apply()
        after = ast.unparse(ast.fix_missing_locations(tree))
        found.setdefault(after, Mutant(edit.kind, _change(before, after), after))
    return list(found.values())


def _edits(tree: ast.Module, function: str) -> list[_Edit]:
    statements = tree.body
    if function:
        (named,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function)
        statements = named.body[ast.get_docstring(named) is not None :]
        first = len(named.body) - len(statements)
        dropped = [_drop(named, "body", first + i) for i, s in enumerate(statements) if not isinstance(s, _KEPT)]
    else:
        dropped = [_drop(tree, "body", i) for i, s in enumerate(statements) if not isinstance(s, _KEPT)]
    inner = [edit for statement in statements for node in ast.walk(statement) for edit in _edits_of(node)]
    return dropped + inner


def _edits_of(node: ast.AST) -> Iterator[_Edit]:
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in _OPERATORS:
        yield _Edit("operator", node, "op", _OPERATORS[type(node.op)]())
    if isinstance(node, ast.Compare):
        for index, op in enumerate(node.ops):
            yield _Edit("comparison", node, "ops", _COMPARISONS[type(op)](), index)
    if isinstance(node, ast.BoolOp):
        yield _Edit("logic", node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
    if isinstance(node, ast.Constant) and node.value is not None and node.value is not Ellipsis:
        yield _Edit("constant", node, "value", _other(node.value))
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield _Edit("condition", node, "test", ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.comprehension):
        for index, test in enumerate(node.ifs):
            yield _Edit("condition", node, "ifs", ast.UnaryOp(ast.Not(), test), index)
    for field in ("body", "orelse", "finalbody"):
        block = getattr(node, field, None)
        for index, statement in enumerate(block if isinstance(block, list) else ()):
            if not isinstance(statement, (*_KEPT, ast.Pass)):
                yield _drop(node, field, index)


def _drop(owner: ast.AST, field: str, index: int) -> _Edit:
    return _Edit("dropped statement", owner, field, ast.Pass(), index)


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + (b"x" if isinstance(value, bytes) else "x" if isinstance(value, str) else 1)


def _change(before: str, after: str) -> str:
    lines = zip(before.split("\n"), after.split("\n"), strict=False)
    return next(f"{old.strip()} -> {new.strip()}" for old, new in lines if old != new)
