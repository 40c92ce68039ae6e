"""Sets of real numbers: intervals, unions, finite sets and inequalities of one unknown."""

from __future__ import annotations

from typing import Any

import sympy

from rlbench_rewards.answers.tree import LIST, SET, Node, Relation, Sequence_, UnionOf, Value

_MAX_DEGREE = 6


def is_region(node: Node) -> bool:
    """Whether `region_of` can make a set of reals of the node."""
    if isinstance(node, UnionOf):
        return all(is_region(part) for part in node.parts)
    if isinstance(node, Sequence_):
        has_ends = node.brackets in (SET, LIST) or len(node.items) == 2
        return has_ends and all(isinstance(i, Value) and i.expr.is_extended_real for i in node.items)
    if isinstance(node, Value):
        return str(node.expr) in ("mathbb:R", "emptyset")
    return isinstance(node, Relation) and _unknown(node) is not None and "=" not in node.operators


def region_of(node: Node) -> Any:
    """The sympy set; only for nodes of which `is_region` is true."""
    if isinstance(node, UnionOf):
        return sympy.Union(*(region_of(part) for part in node.parts))
    if isinstance(node, Sequence_):
        values = [item.expr for item in node.items if isinstance(item, Value)]
        if node.brackets in (SET, LIST):
            return sympy.FiniteSet(*values)
        return sympy.Interval(*values, left_open=node.brackets[0] == "(", right_open=node.brackets[1] == ")")
    if isinstance(node, Value):
        return sympy.Reals if str(node.expr) == "mathbb:R" else sympy.EmptySet
    assert isinstance(node, Relation)
    return _solutions(node)


def equal_regions(first: Any, second: Any) -> bool:
    return first == second or sympy.simplify(first) == sympy.simplify(second)


def _unknown(relation: Relation) -> Any | None:
    """The only unknown of a relation of polynomials of low degree (or of an unknown f(x) alone)."""
    sides = [side.expr for side in relation.sides if isinstance(side, Value)]
    if len(sides) != len(relation.sides):
        return None
    applied = set().union(*(side.atoms(sympy.core.function.AppliedUndef) for side in sides))
    if len(applied) == 1:
        return applied.pop()
    symbols = set().union(*(side.free_symbols for side in sides))
    if applied or len(symbols) != 1:
        return None
    symbol = symbols.pop()
    plain = [side.replace(sympy.Abs, lambda inner: inner) for side in sides]
    is_low = all(p.is_polynomial(symbol) and sympy.degree(p, symbol) <= _MAX_DEGREE for p in plain if p.has(symbol))
    return symbol if is_low else None


def _solutions(relation: Relation) -> Any:
    unknown, real = _unknown(relation), sympy.Symbol("x", real=True)
    sides = [side.expr.xreplace({unknown: real}) for side in relation.sides if isinstance(side, Value)]
    made = {"<": sympy.Lt, ">": sympy.Gt, "<=": sympy.Le, ">=": sympy.Ge, "!=": sympy.Ne}
    links = [made[o](left, right) for o, left, right in zip(relation.operators, sides, sides[1:], strict=False)]
    regions = [
        link.as_set() if link not in (True, False) else (sympy.Reals if link else sympy.EmptySet) for link in links
    ]
    return sympy.Intersection(*regions)
