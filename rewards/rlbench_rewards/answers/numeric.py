"""Equality of expressions by value: exact for rationals, 30 digits for other numbers, random points for symbols."""

from __future__ import annotations

from typing import Any

import sympy

_DIGITS = 30
_TOLERANCE = sympy.Float("1e-25", 40)
# Points that no one would choose: fixed, so that a verdict never changes; both signs, so that |x| is not x.
_PARTS = (
    "0.73190481",
    "-1.38127349",
    "2.41907342",
    "-0.29183746",
    "1.17320508",
    "-2.6457513",
    "0.5413812",
    "3.3166247",
)
_NUM_POINTS = 6
_MIN_POINTS = 3


def equal_numbers(first: Any, second: Any) -> bool:
    """Whether two sympy expressions have the same value everywhere they were tried.

    Rationals are compared exactly. Other numbers must agree to 25 digits, relative to the larger one, so 10^-20 is not
    2 * 10^-20. With symbols the two must agree at all of six points at which both exist (at least three).
    """
    if first == second:
        return True
    if first.is_Rational and second.is_Rational:
        return False
    symbols = _symbols(first, second)
    if not symbols:
        return _close(_value(first, {}), _value(second, {}))
    verdicts = []
    for point in _points(symbols):
        one, other = _value(first, point), _value(second, point)
        if one is None and other is None:
            continue
        if not _close(one, other):
            return False
        verdicts.append(True)
    return len(verdicts) >= _MIN_POINTS


def equal_up_to_factor(first: Any, second: Any) -> int:
    """Sign of the constant c with first = c * second, or 0 if there is none: two equations with the same solutions."""
    symbols = _symbols(first, second)
    if not symbols:
        return 1 if equal_numbers(first, second) else 0
    factor, found = None, 0
    for point in _points(symbols):
        one, other = _value(first, point), _value(second, point)
        if one is None or other is None or _is_zero(one) or _is_zero(other):
            if one is not None and other is not None and _is_zero(one) != _is_zero(other):
                return 0
            continue
        ratio = one / other
        if factor is not None and not _close(ratio, factor):
            return 0
        factor, found = ratio, found + 1
    if factor is None or found < _MIN_POINTS or abs(sympy.im(factor)) > _TOLERANCE * abs(factor):
        return 0
    return 1 if sympy.re(factor) > 0 else -1


def _symbols(first: Any, second: Any) -> list[Any]:
    """Symbols, and applied unknown functions such as f(2), of both."""
    functions = first.atoms(sympy.core.function.AppliedUndef) | second.atoms(sympy.core.function.AppliedUndef)
    inside = set().union(*(function.free_symbols for function in functions)) if functions else set()
    free = {s for s in first.free_symbols | second.free_symbols if s not in inside}
    return sorted(functions | free | inside, key=str)


def _points(symbols: list[Any]) -> list[dict[Any, Any]]:
    points = []
    for shift in range(_NUM_POINTS):
        values = [_PARTS[(shift + 3 * index) % len(_PARTS)] for index in range(len(symbols))]
        scale = [sympy.Float(v, 40) * (1 + sympy.Rational(shift * (i + 1), 7)) for i, v in enumerate(values)]
        points.append(dict(zip(symbols, scale, strict=True)))
    return points


def _value(expr: Any, point: dict[Any, Any]) -> Any | None:
    """The number that `expr` is at the point; None if it does not exist there."""
    functions = {symbol: value for symbol, value in point.items() if not symbol.is_Symbol}
    rest = {symbol: value for symbol, value in point.items() if symbol.is_Symbol}
    if functions:
        expr = expr.xreplace(functions)
    try:
        value = expr.evalf(_DIGITS, subs=rest) if rest else expr.evalf(_DIGITS)
    except (ZeroDivisionError, ValueError, OverflowError):
        return None
    if value in (sympy.oo, -sympy.oo):
        return value
    return value if value.is_number and value.is_finite and not value.free_symbols else None


def _is_zero(value: Any) -> bool:
    return value == 0 or bool(abs(value) < sympy.Float("1e-28", 40))


def _close(one: Any | None, other: Any | None) -> bool:
    if one is None or other is None:
        return False
    if one in (sympy.oo, -sympy.oo) or other in (sympy.oo, -sympy.oo):
        return one == other
    difference = sympy.N(one - other, _DIGITS)
    scale = max(abs(one), abs(other), key=lambda v: sympy.N(v, 15))
    return bool(difference == 0 or abs(difference) <= _TOLERANCE * scale)
