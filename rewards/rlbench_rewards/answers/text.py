"""Answers as people and models write them, brought to one spelling. No meaning is decided here."""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_VULGAR = re.compile("[¼½¾⅐-⅞]")
_CHARACTERS = {
    "\u2212": "-", "\u2013": "-", "\u2010": "-", "\u2011": "-", "\ufe63": "-", "\uff0d": "-",
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "\u2044": "/", "\u2215": "/",
    "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ", "°": r"\degree ", "∅": r"\emptyset ",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "μ": r"\mu ",
    "σ": r"\sigma ", "φ": r"\phi ", "ω": r"\omega ", "ℝ": r"\mathbb{R}", "⟨": r"\langle ", "⟩": r"\rangle ",
    "€": "$", "£": "$", "¥": "$", "₹": "$", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
    "“": '"', "”": '"', "‘": "'", "’": "'",
}  # fmt: skip
_REPLACED = (
    (re.compile(r",?\\!\s*"), lambda m: "," if m[0].startswith(",") else ""),  # 11,\! 111 is one number
    (re.compile(r"\s*\{\s*,\s*\}\s*"), ","),  # 14{,}916
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|nolimits|strut|hfill|rm|bf|it)(?![a-zA-Z])"), ""),
    (re.compile(r"(?<!\\)\\(?:q?quad|[,;:> ~])|~"), " "),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![a-zA-Z])"), r"\\binom"),
    (re.compile(r"\\(?:leq|leqslant|leqq)(?![a-zA-Z])|<=|=<"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant|geqq)(?![a-zA-Z])|>="), r"\\ge "),
    (re.compile(r"\\(?:neq)(?![a-zA-Z])|!="), r"\\ne "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\(?:varnothing)(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"\\colon(?![a-zA-Z])"), ":"),
    (re.compile(r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])"), r"\\degree "),
    (re.compile(r"\*\*"), "^"),
)  # fmt: skip
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))


def clean(text: str) -> str:
    """One spelling: LaTeX commands for signs, no spacing commands, no delimiters around the whole, no final stop."""
    text = strip_delimiters(text)
    text = _SUPERSCRIPT_RUN.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _VULGAR.sub(_vulgar_fraction, text)
    text = "".join(_CHARACTERS.get(char, char) for char in text)
    text = unicodedata.normalize("NFKC", text)
    text = "".join(_CHARACTERS.get(char, char) for char in text)
    if "\\begin" not in text:  # written twice by a row that was escaped twice; a line break only in matrices
        text = re.sub(r"\\\\(?=[a-zA-Z{}(\[])", r"\\", text)
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    text = text.replace("\\$", " ").replace("\\%", "%").replace("$", " ")
    text = re.sub(r"\\[()\[\]]", " ", text)  # inner math delimiters
    return strip_delimiters(text)


def strip_delimiters(text: str) -> str:
    """Without `$`, `\\(`, `\\[`, `**` and `\\boxed{}` around the whole text and without a full stop at its end."""
    text = text.strip()
    for _ in range(8):
        before = text
        text = text.strip().removesuffix(".").strip()
        for opening, closing in _DELIMITERS:
            if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
                inner = text[len(opening) : -len(closing)]
                text = inner if opening not in inner else text
        box = re.match(r"\\(?:boxed|fbox)\s*\{", text)
        if box and closing_brace(text, box.end() - 1) == len(text) - 1:
            text = text[box.end() : -1]
        if text == before:
            break
    return text


def closing_brace(text: str, opening: int) -> int:
    """Position of the brace that closes the one at `opening`, or -1. `\\{` and `\\}` do not count."""
    depth, position = 0, opening
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 2
            continue
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return position
        position += 1
    return -1


def text_key(text: str) -> str:
    """What is equal for two answers that are the same text: no blanks, no `\\text{}`, case kept for single letters."""
    text = re.sub(
        r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}", r"\1", text
    )
    key = "".join(text.split()).strip("\"'")
    if key.startswith("(") and key.endswith(")") and key[1:-1].isalpha():
        key = key[1:-1]
    return key.casefold() if len(key) > 1 and key.replace("-", "").isalpha() else key


def _vulgar_fraction(match: re.Match[str]) -> str:
    top, bottom = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}"
