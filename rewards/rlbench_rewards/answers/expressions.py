"""Expressions: tokens to sympy by recursive descent. Every power, factorial and binomial is bounded before it is built.

sum    := [+-] term ([+-] term)*
term   := power ((* | / | nothing) power)*
power  := postfix (^ exponent)*
postfix:= atom (! | % | degree)*
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy

from rlbench_rewards.answers import bounds
from rlbench_rewards.answers.tokens import FUNCTIONS, NAME, NUMBER, SIGN, SUBSCRIPT, SYMBOL, NotMath, Token

_ONE_ARGUMENT: dict[str, Callable[..., Any]] = {
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "asin": sympy.asin, "acos": sympy.acos,
    "atan": sympy.atan, "sinh": sympy.sinh, "cosh": sympy.cosh, "tanh": sympy.tanh, "ln": sympy.log,
    "log": sympy.log, "lg": lambda x: sympy.log(x, 10), "abs": sympy.Abs, "floor": sympy.floor, "ceil": sympy.ceiling,
}  # fmt: skip
_GROWING = ("sinh", "cosh", "tanh")
_CALLED = "fghFGH"  # letters that are functions when a bracket follows at once
_MAX_BARS = 10
_BRACKETS = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True, slots=True)
class Factor:
    """A value under construction."""

    expr: Any  # sympy expression, or a sympy matrix
    height: int = 0  # of its tower of powers
    decimals: int | None = None
    is_percent: bool = False
    rows: tuple[tuple[Any, ...], ...] | None = None  # set on the finished value of a matrix


class ExpressionParser:
    """Reads one expression.

    Args:
        tokens: of the whole expression; all must be used.
        read_matrix: makes rows from the tokens between `\\begin` and `\\end`.
    """

    def __init__(self, tokens: list[Token], read_matrix: Callable[[list[Token]], tuple[tuple[Any, ...], ...]]) -> None:
        self._tokens = list(tokens)
        self._position = 0
        self._read_matrix = read_matrix
        self._open_bars = 0

    def whole(self) -> Factor:
        """The expression that all tokens are.

        Raises:
            NotMath: it is none. AnswerTooBig: over a bound.
        """
        is_percent = len(self._tokens) > 1 and self._tokens[-1].kind == SIGN and self._tokens[-1].text == "%"
        if is_percent:
            self._tokens.pop()
        factor = self._sum()
        if self._position < len(self._tokens):
            raise NotMath(f"something behind the expression: {self._tokens[self._position].text!r}")
        if isinstance(factor.expr, sympy.MatrixBase):
            rows = tuple(tuple(factor.expr[i, j] for j in range(factor.expr.cols)) for i in range(factor.expr.rows))
            return Factor(factor.expr, rows=rows)
        if factor.expr.has(sympy.zoo, sympy.nan):
            raise NotMath("a value that does not exist")
        return Factor(factor.expr, factor.height, decimals=self._decimals(), is_percent=is_percent)

    def _decimals(self) -> int | None:
        """Digits behind the point, if everything is one written decimal with an optional sign."""
        plain = [t for t in self._tokens if not (t.kind == SIGN and t.text in ("+", "-", "degree"))]
        if len(plain) != 1 or plain[0].kind != NUMBER or "." not in plain[0].text or "~" in plain[0].text:
            return None
        mantissa, _, exponent = plain[0].text.lower().partition("e")
        return len(mantissa.partition(".")[2]) - int(exponent or 0)

    # --- looking ahead

    def _peek(self, offset: int = 0) -> Token | None:
        index = self._position + offset
        return self._tokens[index] if index < len(self._tokens) else None

    def _is_sign(self, *signs: str, offset: int = 0) -> bool:
        token = self._peek(offset)
        return token is not None and token.kind == SIGN and token.text in signs

    def _take(self) -> Token:
        token = self._peek()
        if token is None:
            raise NotMath("the expression ends too early")
        self._position += 1
        return token

    def _expect(self, sign: str) -> None:
        if not self._is_sign(sign):
            raise NotMath(f"expected {sign}")
        self._position += 1

    # --- levels

    def _sum(self) -> Factor:
        total = self._signed_term()
        while self._is_sign("+", "-"):
            total = _add(total, self._signed_term())
        return total

    def _signed_term(self) -> Factor:
        is_negative = False
        while self._is_sign("+", "-"):
            is_negative ^= self._take().text == "-"
        term = self._term()
        return Factor(-term.expr, term.height) if is_negative else term

    def _term(self) -> Factor:
        product = self._power()
        while True:
            if self._is_sign("*"):
                self._take()
                product = _multiply(product, self._signed_power())
            elif self._is_sign("/"):
                self._take()
                product = _divide(product, self._signed_power())
            elif self._starts_implicit_factor():
                product = _multiply(product, self._power())
            else:
                return product

    def _signed_power(self) -> Factor:
        if self._is_sign("-"):
            self._take()
            power = self._power()
            return Factor(-power.expr, power.height)
        return self._power()

    def _starts_implicit_factor(self) -> bool:
        token = self._peek()
        if token is None or token.kind == NUMBER:
            return False
        if token.kind in (NAME, SYMBOL):
            return True
        if token.text == "|":
            return self._open_bars == 0
        return token.kind == SIGN and token.text in ("(", "[", "{", "begin", "lfloor", "lceil")

    def _power(self) -> Factor:
        base = self._postfix()
        if not self._is_sign("^"):
            return base
        self._take()
        return _raise(base, self._exponent())

    def _exponent(self) -> Factor:
        sign = -1 if self._is_sign("-") else 1
        if self._is_sign("-", "+"):
            self._take()
        exponent = self._bracketed() if self._is_sign("{", "(") else self._postfix()
        if self._is_sign("^"):  # right to left
            self._take()
            exponent = _raise(exponent, self._exponent())
        return Factor(sign * exponent.expr, exponent.height)

    def _postfix(self) -> Factor:
        factor = self._atom()
        while self._is_sign("!", "%", "degree"):
            sign = self._take().text
            if sign == "!":
                factor = Factor(sympy.factorial(_small_natural(factor.expr)))
                if self._is_sign("!"):
                    raise NotMath("a double factorial")
            elif sign == "%":
                factor = Factor(factor.expr / 100, factor.height)
        return factor

    def _atom(self) -> Factor:
        token = self._take()
        if token.kind == NUMBER:
            return self._number(token)
        if token.kind == SYMBOL:
            return self._symbol(token)
        if token.kind == NAME:
            return self._named(token.text)
        if token.kind == SIGN and token.text in _BRACKETS:
            self._position -= 1
            return self._bracketed()
        if token.kind == SIGN and token.text == "|":
            return self._absolute()
        if token.kind == SIGN and token.text in ("lfloor", "lceil"):
            inner = self._sum()
            self._expect("rfloor" if token.text == "lfloor" else "rceil")
            return Factor((sympy.floor if token.text == "lfloor" else sympy.ceiling)(inner.expr), inner.height)
        if token.kind == SIGN and token.text == "begin":
            return self._matrix()
        raise NotMath(f"{token.text!r} where a value is expected")

    def _bracketed(self) -> Factor:
        opening = self._take().text
        bars, self._open_bars = self._open_bars, 0
        inner = self._sum()
        self._open_bars = bars
        self._expect(_BRACKETS[opening])
        return inner

    def _absolute(self) -> Factor:
        self._open_bars += 1
        if self._open_bars > _MAX_BARS:
            raise NotMath("absolute values nested too deeply")
        inner = self._sum()
        self._open_bars -= 1
        self._expect("|")
        return Factor(sympy.Abs(inner.expr), inner.height)

    def _matrix(self) -> Factor:
        start, depth = self._position, 1
        while depth:
            token = self._take()
            depth += (token.kind == SIGN and token.text == "begin") - (token.kind == SIGN and token.text == "end")
        return Factor(sympy.ImmutableMatrix(self._read_matrix(self._tokens[start : self._position - 1])))

    def _number(self, token: Token) -> Factor:
        value = exact(token.text)
        if self._has_subscript():
            return Factor(sympy.Symbol(f"{token.text}_{self._take().text}"))
        if "." not in token.text and (fraction := self._mixed_part()) is not None:
            return Factor(value + fraction)
        return Factor(value)

    def _mixed_part(self) -> Any | None:
        """The proper fraction that follows a whole number: `1 1/4` or `1\\frac{1}{4}`."""
        texts = [t.text for t in self._tokens[self._position : self._position + 7]]
        if len(texts) == 7 and texts[0] == "frac" and [texts[i] for i in (1, 3, 4, 6)] == ["{", "}", "{", "}"]:
            top, bottom, length = texts[2], texts[5], 7
        elif texts[:1] == ["frac"] and len(texts) > 1 and texts[1].isdigit() and len(texts[1]) == 2:
            top, bottom, length = texts[1][0], texts[1][1], 2
        elif len(texts) >= 3 and texts[1] == "/" and self._tokens[self._position].has_blank_before:
            top, bottom, length = texts[0], texts[2], 3
        else:
            return None
        if not (top.isdecimal() and bottom.isdecimal() and 0 < int(top) < int(bottom)):
            return None
        self._position += length
        return sympy.Rational(int(top), int(bottom))

    def _symbol(self, token: Token) -> Factor:
        if self._has_subscript():
            return Factor(sympy.Symbol(f"{token.text}_{self._take().text}"))
        if token.text == "e":
            return Factor(sympy.E)
        if token.text == "i":
            return Factor(sympy.I)
        if token.text in _CALLED and self._is_sign("("):
            return Factor(sympy.Function(token.text)(*self._arguments()))
        return Factor(sympy.Symbol(token.text))

    def _has_subscript(self) -> bool:
        token = self._peek()
        return token is not None and token.kind == SUBSCRIPT

    def _arguments(self) -> list[Any]:
        self._expect("(")
        arguments = [self._sum().expr]
        while self._is_sign(","):
            self._take()
            arguments.append(self._sum().expr)
        self._expect(")")
        return arguments

    def _named(self, name: str) -> Factor:
        if name == "pi":
            return Factor(sympy.pi)
        if name in ("infty", "inf", "infinity", "oo"):
            return Factor(sympy.oo)
        if name == "frac":
            return _divide(self._frac_part(), self._frac_part())
        if name == "binom":
            top, bottom = _small_natural(self._frac_part().expr), _small_natural(self._frac_part().expr)
            return Factor(sympy.binomial(top, bottom))
        if name == "sqrt":
            return self._root()
        if name in FUNCTIONS:
            return self._function(name)
        if self._has_subscript():
            return Factor(sympy.Symbol(f"{name}_{self._take().text}"))
        return Factor(sympy.Symbol(name))

    def _frac_part(self) -> Factor:
        """`{...}`, `(...)`, a symbol, or one digit of a number: `\\frac13` is a third."""
        if self._is_sign("{", "("):
            return self._bracketed()
        token = self._peek()
        if token is not None and token.kind == NUMBER and token.text.isdigit() and len(token.text) > 1:
            self._tokens[self._position] = Token(NUMBER, token.text[1:])
            return Factor(exact(token.text[0]))
        return self._atom()

    def _root(self) -> Factor:
        index: Any = sympy.Integer(2)
        if self._is_sign("["):
            index = self._bracketed().expr
        inside = self._bracketed() if self._is_sign("{", "(") else self._atom()
        if not (index.is_Integer and 0 < int(index) <= 100):
            raise NotMath("a root's index")
        return _raise(inside, Factor(sympy.Rational(1, int(index))))

    def _function(self, name: str) -> Factor:
        base = None
        exponent: Factor | None = None
        if name == "log" and self._has_subscript():
            base = Factor(_log_base(self._take().text))
        if self._is_sign("^"):
            self._take()
            exponent = self._exponent()
        argument = self._argument()
        if name == "exp":
            value = _raise(Factor(sympy.E), argument)
        elif base is not None:
            value = Factor(sympy.log(argument.expr, base.expr), argument.height)
        elif exponent is not None and exponent.expr == -1 and f"arc{name}" in _ONE_ARGUMENT:
            return Factor(_ONE_ARGUMENT[f"arc{name}"](argument.expr), argument.height)
        else:
            height = argument.height + (name in _GROWING)
            bounds.check_power_height(height)
            value = Factor(_ONE_ARGUMENT[name](argument.expr), height)
        return _raise(value, exponent) if exponent is not None else value

    def _argument(self) -> Factor:
        """In brackets, or the product up to the next sign or function: `\\sin 2x`."""
        if self._is_sign("(", "{", "["):
            return self._bracketed()
        product = self._power()
        while self._starts_implicit_factor() and not self._is_sign("(", "[", "{"):
            token = self._peek()
            if token is not None and token.kind == NAME and token.text in FUNCTIONS and token.text != "frac":
                break
            product = _multiply(product, self._power())
        return product


def exact(text: str) -> Any:
    """The written number as an exact rational; `0.1~6` repeats the 6."""
    mantissa, _, exponent = text.lower().partition("e")
    if exponent:
        bounds.check_power(4, int(exponent))
    written, _, repeated = mantissa.partition("~")
    value = Fraction(written.rstrip(".") if written != "." else "0") * Fraction(10) ** int(exponent or 0)
    if repeated:
        places = len(written.partition(".")[2])
        value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10**places)
    return sympy.Rational(value.numerator, value.denominator)


def _log_base(text: str) -> Any:
    if text.isdecimal() and int(text) > 1:
        return sympy.Integer(text)
    if len(text) == 1 and text.isalpha():
        return sympy.E if text == "e" else sympy.Symbol(text)
    raise NotMath("a logarithm's base")


def _small_natural(expr: Any) -> Any:
    if not expr.is_Integer:
        raise NotMath("a factorial or binomial of something that is no whole number")
    bounds.check_factorial(int(expr))
    return expr


def _add(first: Factor, second: Factor) -> Factor:
    _check_same_kind(first, second)
    if isinstance(first.expr, sympy.MatrixBase) and first.expr.shape != second.expr.shape:
        raise NotMath("a sum of matrices of different shapes")
    return Factor(first.expr + second.expr, max(first.height, second.height))


def _multiply(first: Factor, second: Factor) -> Factor:
    left, right = first.expr, second.expr
    if isinstance(left, sympy.MatrixBase) and isinstance(right, sympy.MatrixBase) and left.cols != right.rows:
        raise NotMath("a product of matrices that do not fit")
    return Factor(left * right, max(first.height, second.height))


def _divide(first: Factor, second: Factor) -> Factor:
    if isinstance(second.expr, sympy.MatrixBase) or second.expr.is_zero:
        raise NotMath("a division by zero or by a matrix")
    return Factor(first.expr / second.expr, max(first.height, second.height))


def _raise(base: Factor, exponent: Factor) -> Factor:
    """base^exponent, bounded."""
    if isinstance(base.expr, sympy.MatrixBase) or isinstance(exponent.expr, sympy.MatrixBase):
        raise NotMath("a power of a matrix")
    height = max(base.height, exponent.height + 1)
    bounds.check_power_height(height)
    if exponent.expr.is_Rational:
        bits = _bits(base.expr) if base.expr.is_Rational else 2
        size = abs(Fraction(int(exponent.expr.p), int(exponent.expr.q)))
        bounds.check_power(bits, int(size) + (size.denominator != 1))
        if base.expr.is_zero and exponent.expr <= 0:
            raise NotMath("zero to a power that is not positive")
    return Factor(base.expr**exponent.expr, height)


def _bits(number: Any) -> int:
    return max(int(number.p).bit_length(), int(number.q).bit_length())


def _check_same_kind(first: Factor, second: Factor) -> None:
    if isinstance(first.expr, sympy.MatrixBase) != isinstance(second.expr, sympy.MatrixBase):
        raise NotMath("a sum of a matrix and a number")
