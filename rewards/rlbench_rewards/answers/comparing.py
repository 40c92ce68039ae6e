"""Whether two answer trees are the same answer. What the gold answer looks like decides how the other one is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from rlbench_rewards.answers.numeric import equal_numbers, equal_up_to_factor
from rlbench_rewards.answers.regions import equal_regions, is_region, region_of
from rlbench_rewards.answers.tree import LIST, SET, Matrix, Node, Ratio, Relation, Sequence_, Text, UnionOf, Value

SAME, FRACTION, BOTH = "same", "fraction", "both"
_NO_NUMBERS = (sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


@dataclass(frozen=True, slots=True)
class Rules:
    """What counts as the same answer; see `MathAnswer`."""

    percent: str = SAME
    min_rounded_digits: int = 6
    relations_as_sets: bool = False


def equal_answers(answer: Node, gold: Node, rules: Rules) -> bool:
    """Whether `answer` says what `gold` says. Not symmetric: an assignment x = 5 answers 5 and the other way round,
    an inequality does not answer an interval unless `relations_as_sets` is set (it would restate the question)."""
    answer, gold = _unwrap(answer, gold)
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _equal_relations(answer, gold, rules)
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        may_be_set = isinstance(gold, Relation) or rules.relations_as_sets
        return (
            may_be_set and is_region(answer) and is_region(gold) and equal_regions(region_of(answer), region_of(gold))
        )
    if isinstance(gold, Value) and isinstance(answer, Value):
        return _equal_values(answer, gold, rules)
    if isinstance(gold, Text) or isinstance(answer, Text):
        return _text_of(answer) == _text_of(gold) != ""
    if isinstance(gold, UnionOf) or isinstance(answer, UnionOf):
        return _equal_unions(answer, gold, rules)
    if isinstance(gold, Ratio) and isinstance(answer, Ratio):
        return _all_equal(answer.parts, gold.parts, rules)
    if isinstance(gold, Matrix) or isinstance(answer, Matrix):
        return _equal_matrices(answer, gold, rules)
    return _equal_sequences(answer, gold, rules)


def _unwrap(answer: Node, gold: Node) -> tuple[Node, Node]:
    """Both without the name of the unknown where only one of them has it: x = 5 and 5."""
    answer_value, gold_value = assigned_value(answer), assigned_value(gold)
    if answer_value is not None and not _is_equation(gold):
        return _unwrap(answer_value, gold) if not _has_assignments(gold) else (answer_value, gold)
    if gold_value is not None and not _is_equation(answer):
        return answer, gold_value
    if answer_value is not None and gold_value is not None:
        return _first_and_last(answer), _first_and_last(gold)
    if _has_assignments(gold) and not _has_assignments(answer):
        return answer, _without_names(gold)
    if _has_assignments(answer) and not _has_assignments(gold):
        return _without_names(answer), gold
    return answer, gold


def _is_equation(node: Node) -> bool:
    return isinstance(node, Relation) and set(node.operators) == {"="}


def assigned_value(node: Node) -> Node | None:
    """The last side of `name = ... = value` or of a numeric chain `2 + 3 = 5`; None for other relations.

    Steps of the chain that are numbers must agree: `x = 5 = 7` has no value.
    """
    if not (isinstance(node, Relation) and set(node.operators) == {"="}):
        return None
    first, last = node.sides[0], node.sides[-1]
    steps = node.sides[1:] if _is_name(first) else node.sides
    numbers = [s.expr for s in steps if isinstance(s, Value) and not s.expr.free_symbols]
    if not _is_name(first) and len(numbers) != len(steps):
        return None
    if any(not equal_numbers(number, numbers[-1]) for number in numbers):
        return None
    return last


def _is_name(node: Node) -> bool:
    """x, AB, f(x), |AB|, a:b, (p, q), NO/BO: something that a value is given to. Not x^2, not x + 1, not 2x."""
    if isinstance(node, Text):
        return True
    if isinstance(node, (Ratio, Sequence_)):
        return all(_is_name(part) for part in (node.parts if isinstance(node, Ratio) else node.items))
    if not isinstance(node, Value) or not (node.expr.free_symbols or node.expr.has(sympy.core.function.AppliedUndef)):
        return False
    expr = node.expr.args[0] if isinstance(node.expr, sympy.Abs) else node.expr
    return all(_is_name_factor(factor) for factor in sympy.Mul.make_args(expr))


def _is_name_factor(factor: Any) -> bool:
    if factor.is_Pow and factor.exp == -1:
        return all(part.is_Symbol for part in sympy.Mul.make_args(factor.base))
    return factor.is_Symbol or factor in (sympy.E, sympy.I) or isinstance(factor, sympy.core.function.AppliedUndef)


def _has_assignments(node: Node) -> bool:
    return isinstance(node, Sequence_) and all(assigned_value(i) is not None or _has_assignments(i) for i in node.items)


def _without_names(node: Node) -> Node:
    """[x = 1, x = 2] as a set, [p = 5, q = 2] as an ordered pair; lists of lists level by level."""
    assert isinstance(node, Sequence_)
    if all(isinstance(item, Sequence_) for item in node.items):
        return Sequence_(node.brackets, tuple(_without_names(item) for item in node.items))
    values = tuple(value for item in node.items if (value := assigned_value(item)) is not None)
    names = {str(item.sides[0]) for item in node.items if isinstance(item, Relation)}
    return Sequence_(LIST if len(names) == 1 else "()", values)


def _first_and_last(node: Node) -> Node:
    assert isinstance(node, Relation)
    return Relation(("=",), (node.sides[0], node.sides[-1]))


def _equal_values(answer: Value, gold: Value, rules: Rules) -> bool:
    pairs = [(answer, gold)]
    if answer.is_percent or gold.is_percent:
        as_fractions = (_as_fraction(answer), _as_fraction(gold))
        pairs = {SAME: pairs, FRACTION: [as_fractions], BOTH: [*pairs, as_fractions]}[rules.percent]
    return any(_equal_written(a, g, rules) for a, g in pairs)


def _as_fraction(value: Value) -> Value:
    if not value.is_percent:
        return value
    decimals = None if value.decimals is None else value.decimals + 2
    return Value(value.expr / 100, decimals=decimals)


def _equal_written(answer: Value, gold: Value, rules: Rules) -> bool:
    for one, other in ((answer, gold), (gold, answer)):
        if one.decimals is not None and other.decimals is None and not other.expr.free_symbols:
            if equal_numbers(one.expr, other.expr):
                return True
            return _is_rounded(one, other.expr, rules.min_rounded_digits)
    return equal_numbers(answer.expr, gold.expr)


def _is_rounded(written: Value, exact: Any, min_digits: int) -> bool:
    """Whether the written decimal is the exact value, correctly rounded, with at least `min_digits` digits."""
    assert written.decimals is not None
    scaled = abs(written.expr) * sympy.Integer(10) ** max(0, written.decimals)
    if len(str(int(scaled))) < min_digits or not exact.is_number:
        return False
    distance = abs(sympy.N(exact - written.expr, 40))
    half = sympy.Rational(1, 2) * sympy.Integer(10) ** (-written.decimals)
    return bool(distance.is_comparable and distance <= half * (1 + sympy.Rational(1, 10**12)))


def _text_of(node: Node) -> str:
    if isinstance(node, Text):
        return node.key
    if isinstance(node, Value) and node.expr.is_Symbol:
        return str(node.expr)
    if isinstance(node, Value) and node.expr in (sympy.E, sympy.I):
        return {sympy.E: "e", sympy.I: "i"}[node.expr]
    return ""


def _equal_relations(answer: Relation, gold: Relation, rules: Rules) -> bool:
    if len(answer.operators) != len(gold.operators):
        return False
    if not all(isinstance(side, Value) for side in (*answer.sides, *gold.sides)):
        return answer.operators == gold.operators and _all_equal(answer.sides, gold.sides, rules)
    if len(gold.operators) > 1:
        flipped = Relation(tuple(_FLIPPED[o] for o in reversed(answer.operators)), tuple(reversed(answer.sides)))
        return any(
            candidate.operators == gold.operators
            and all(_equal_links(candidate, gold, index) for index in range(len(gold.operators)))
            for candidate in (answer, flipped)
        )
    return _equal_links(answer, gold, 0)


def _equal_links(answer: Relation, gold: Relation, index: int) -> bool:
    """One link of two chains: the differences of its sides are equal up to a factor; a negative one turns < into >."""
    operator, expected = answer.operators[index], gold.operators[index]
    difference, wanted = _difference(answer, index), _difference(gold, index)
    if difference.has(*_NO_NUMBERS) or wanted.has(*_NO_NUMBERS):
        return False  # x < infinity says nothing that could be compared
    sign = equal_up_to_factor(difference, wanted)
    if sign == 0:
        return False
    if expected in ("=", "!="):
        return operator == expected
    return (operator if sign > 0 else _FLIPPED[operator]) == expected


def _difference(relation: Relation, index: int) -> Any:
    left, right = relation.sides[index], relation.sides[index + 1]
    assert isinstance(left, Value) and isinstance(right, Value)
    return left.expr - right.expr


def _equal_matrices(answer: Node, gold: Node, rules: Rules) -> bool:
    first, second = _rows(answer), _rows(gold)
    if first is None or second is None or len(first) != len(second):
        return False
    return all(_all_equal(row, other, rules) for row, other in zip(first, second, strict=True))


def _rows(node: Node) -> list[Sequence[Node]] | None:
    """Rows of a matrix, also of [[1, 2], [3, 4]]."""
    if isinstance(node, Matrix):
        return list(node.rows)
    if isinstance(node, Sequence_) and node.brackets == "[]":
        rows = [item.items for item in node.items if isinstance(item, Sequence_) and item.brackets == "[]"]
        return list(rows) if len(rows) == len(node.items) else None
    return None


def _equal_sequences(answer: Node, gold: Node, rules: Rules) -> bool:
    if not isinstance(gold, Sequence_):  # a single value is the set of one
        return isinstance(answer, Sequence_) and answer.brackets == SET and _all_equal(answer.items, (gold,), rules)
    if not isinstance(answer, Sequence_):
        return gold.brackets == SET and _all_equal((answer,), gold.items, rules)
    kinds = {answer.brackets, gold.brackets}
    if kinds <= {LIST, SET}:
        return _same_members(answer.items, gold.items, rules)
    if kinds == {LIST, "()"} or len(kinds) == 1:
        return _all_equal(answer.items, gold.items, rules)
    return False


def _equal_unions(answer: Node, gold: Node, rules: Rules) -> bool:
    parts = [node.parts if isinstance(node, UnionOf) else (node,) for node in (answer, gold)]
    if _same_members(parts[0], parts[1], rules):
        return True
    return is_region(answer) and is_region(gold) and equal_regions(region_of(answer), region_of(gold))


def _all_equal(answer: Sequence[Node], gold: Sequence[Node], rules: Rules) -> bool:
    return len(answer) == len(gold) and all(equal_answers(a, g, rules) for a, g in zip(answer, gold, strict=True))


def _same_members(answer: Sequence[Node], gold: Sequence[Node], rules: Rules) -> bool:
    """Whether every member has a partner on the other side; repeated members count once."""

    def find(item: Node, others: Sequence[Node], is_gold: bool) -> bool:
        return any(equal_answers(o, item, rules) if is_gold else equal_answers(item, o, rules) for o in others)

    one_way: Callable[..., bool] = find
    return all(one_way(a, gold, False) for a in answer) and all(one_way(g, answer, True) for g in gold)
