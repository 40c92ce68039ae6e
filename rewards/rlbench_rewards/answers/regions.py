"""Sets of real numbers: intervals, unions, finite sets and inequalities of one unknown."""

from __future__ import annotations

from typing import Any

import sympy

from rlbench_rewards.answers.tree import LIST, SET, Node, Relation, Sequence_, UnionOf, Value

_MAX_DEGREE = 2  # sympy takes seconds for the roots of higher ones; with |x| it is 1


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
    """The only unknown, x or f(x), of a relation between polynomials of low degree in it; None for other relations."""
    sides = [side.expr for side in relation.sides if isinstance(side, Value)]
    if len(sides) != len(relation.sides) or any(side.has(sympy.oo, -sympy.oo, sympy.I) for side in sides):
        return None
    applied = set().union(*(side.atoms(sympy.core.function.AppliedUndef) for side in sides))
    symbols = set().union(*(side.xreplace(dict.fromkeys(applied, sympy.Integer(0))).free_symbols for side in sides))
    unknowns = applied | symbols
    if len(unknowns) != 1:
        return None
    unknown = unknowns.pop()
    return unknown if all(_is_low(side, unknown) for side in sides) else None


def _is_low(side: Any, unknown: Any) -> bool:
    inner = side.atoms(sympy.Abs)
    if any(expr.args[0].has(sympy.Abs) for expr in inner):
        return False
    plain = side.replace(sympy.Abs, lambda argument: argument)
    return plain.is_polynomial(unknown) and (
        not plain.has(unknown) or sympy.degree(plain, unknown) <= (1 if inner else _MAX_DEGREE)
    )


def _solutions(relation: Relation) -> Any:
    unknown, real = _unknown(relation), sympy.Symbol("x", real=True)
    sides = [side.expr.xreplace({unknown: real}) for side in relation.sides if isinstance(side, Value)]
    made = {"<": sympy.Lt, ">": sympy.Gt, "<=": sympy.Le, ">=": sympy.Ge, "!=": sympy.Ne}
    links = [made[o](left, right) for o, left, right in zip(relation.operators, sides, sides[1:], strict=False)]
    regions = [
        link.as_set() if link not in (True, False) else (sympy.Reals if link else sympy.EmptySet) for link in links
    ]
    return sympy.Intersection(*regions)
