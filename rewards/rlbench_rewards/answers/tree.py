"""What an answer is once it has been read: values, and the structures around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LIST, SET = "list", "set"


@dataclass(frozen=True, slots=True)
class Value:
    """A number or an expression.

    Example:
        Value(expr=Rational(1, 3), decimals=None); "0.333333" is Value(expr=Rational(333333, 10**6), decimals=6)
    """

    expr: Any  # sympy.Expr
    decimals: int | None = None  # digits behind the point, if the whole value is one written decimal
    is_percent: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    key: str  # see `text.text_key`


@dataclass(frozen=True, slots=True)
class Sequence_:
    """Items in brackets, or a bare list.

    `brackets` is "list" for bare items, "set" for braces, else the two brackets: "()", "[)", "(]" or "[]".
    """

    brackets: str
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class UnionOf:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """`sides[0] operators[0] sides[1] ...`; operators are = < > <= >= !=."""

    operators: tuple[str, ...]
    sides: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    parts: tuple[Node, ...]  # of a : b : c


Node = Value | Text | Sequence_ | UnionOf | Matrix | Relation | Ratio
