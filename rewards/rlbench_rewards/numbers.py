"""Plain numbers, exactly: what a person would read as one number becomes one Fraction, everything else None."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MAX_DIGITS = 1000

_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u2010": "-", "\u2011": "-"})
_NOT_DIGITS = frozenset("⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞①②③④⑤⑥⑦⑧⑨")  # NFKC would make 52 of 5²
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = re.compile(rf"([-+]?)({_INTEGER}(?:\.\d*)?|\.\d+)")
_RATIO = re.compile(rf"([-+]?)({_INTEGER})\s*/\s*({_INTEGER})")
_MIXED = re.compile(rf"([-+]?)({_INTEGER})\s+(\d+)\s*/\s*(\d+)")


def parse_number(text: str) -> Fraction | None:
    """The number that the whole text is, or None.

    Reads signs, thousands separators, decimals, `a/b`, mixed numbers `1 1/4`, a leading or trailing `$`, a trailing
    `%` (which is dropped: 10% equals 10) and a trailing full stop.
    """
    if any(char in _NOT_DIGITS for char in text):
        return None
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS).strip().strip("$").strip()
    text = text.removesuffix(".").removesuffix("%").removesuffix("\\").strip()
    text = re.sub(r"^([-+]?)\s*\$\s*", r"\1", text)
    if sum(char.isdigit() for char in text) > MAX_DIGITS:
        return None
    if match := _DECIMAL.fullmatch(text):
        return _signed(match[1], Fraction(match[2].replace(",", "").rstrip(".") or "0"))
    if (match := _RATIO.fullmatch(text)) and _integer(match[3]):
        return _signed(match[1], Fraction(_integer(match[2]), _integer(match[3])))
    if (match := _MIXED.fullmatch(text)) and int(match[4]):
        return _signed(match[1], _integer(match[2]) + Fraction(int(match[3]), int(match[4])))
    return None


def _integer(text: str) -> int:
    return int(text.replace(",", ""))


def _signed(sign: str, value: Fraction | int) -> Fraction:
    return Fraction(-value if sign == "-" else value)
