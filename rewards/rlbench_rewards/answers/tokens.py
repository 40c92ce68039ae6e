"""An answer's text as a list of tokens. Anything that is not on the list of names and signs is a word or an error."""

from __future__ import annotations

import re
from dataclasses import dataclass

NUMBER, NAME, SYMBOL, WORD, SIGN, SUBSCRIPT = "number", "name", "symbol", "word", "sign", "subscript"

FUNCTIONS = ("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh",
             "ln", "log", "lg", "exp", "sqrt", "frac", "binom", "abs", "floor", "ceil", "asin", "acos",
             "atan")  # fmt: skip
GREEK = ("alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "kappa",
         "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "phi", "varphi", "chi", "psi", "omega", "Gamma", "Delta",
         "Theta", "Lambda", "Xi", "Sigma", "Phi", "Psi", "Omega", "ell", "emptyset")  # fmt: skip
CONSTANTS = ("pi", "infty", "inf", "infinity", "oo")
_RELATIONS = {"le": "<=", "ge": ">=", "ne": "!=", "in": "in", "approx": "~", "cup": "cup", "pm": "pm", "mp": "mp",
              "times": "*", "cdot": "*", "div": "/", "mid": "|", "vert": "|", "lvert": "|", "rvert": "|",
              "lbrace": "\\{", "rbrace": "\\}", "langle": "(", "rangle": ")", "lfloor": "lfloor", "rfloor": "rfloor",
              "lceil": "lceil", "rceil": "rceil", "degree": "degree", "implies": "=>", "sim": "~"}  # fmt: skip
_TEXT = ("text", "textbf", "textit", "textrm", "textnormal", "mbox", "textsf", "texttt")
_FONTS = ("mathrm", "mathbf", "mathit", "mathsf", "mathcal", "boldsymbol", "bm", "operatorname", "vec", "hat", "bar",
          "overline", "overrightarrow", "widehat", "tilde", "mathbb", "boxed", "fbox", "mathtt")  # fmt: skip
_SHORT_WORDS = frozenset(
    "cm mm km kg mg ml ft mi lb lbs oz hr hrs min sec yes no and or not odd yd mph kmh usd pct".split()
)

_NUMBER = re.compile(
    r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d{1,3}(?: \d{3})+(?! ?\d)|\d+)(?:\.\d*)?(?:[eE][+-]?\d{1,3}(?![\w]))?|\.\d+"
)
_MATRIX = re.compile(r"\\begin\{(?:[pbvBV]?matrix|smallmatrix|array)\}(?:\s*\{[clr|\s]*\})?")
_END = re.compile(r"\\end\{(?:[pbvBV]?matrix|smallmatrix|array)\}")


@dataclass(frozen=True, slots=True)
class Token:
    kind: str  # "number", "name" (function, Greek letter, constant), "symbol", "word", "sign", "subscript"
    text: str
    has_blank_before: bool = False


class NotMath(ValueError):
    """The text is no answer that the grammar knows."""


def tokenise(text: str) -> list[Token]:
    """Tokens of cleaned text. Linear in its length.

    Raises:
        NotMath: a character or a command that is not known.
    """
    tokens: list[Token] = []
    position = 0
    while position < len(text):
        blank = text[position].isspace()
        while position < len(text) and text[position].isspace():
            position += 1
        if position == len(text):
            break
        token, position = _next(text, position)
        if token is not None:
            tokens.append(Token(token.kind, token.text, blank))
    return tokens


def _next(text: str, position: int) -> tuple[Token | None, int]:
    char = text[position]
    if char == "\\":
        return _command(text, position)
    if (char.isascii() and char.isdigit()) or (char == "." and text[position + 1 : position + 2].isdigit()):
        match = _NUMBER.match(text, position)
        assert match is not None
        return _repeating(text, match) if text.startswith(r"\overline{", match.end()) else (
            Token(NUMBER, match[0].replace(",", "").replace(" ", "")), match.end())  # fmt: skip
    if char.isalpha():
        return _letters(text, position)
    if char == "_":
        return _subscript(text, position + 1)
    if char in "+-*/^()[]{}|=<>,;:!%&'":
        return Token(SIGN, char), position + 1
    raise NotMath(f"the character {char!r}")


def _subscript(text: str, position: int) -> tuple[Token, int]:
    """`_{n+1}`, `_12`, `_x` or `_\\alpha`; what is in it only names."""
    match = re.compile(r"\s*(?:\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|(\d+|[A-Za-z]|\\[A-Za-z]+))").match(text, position)
    if match is None:
        raise NotMath("a subscript")
    return Token(SUBSCRIPT, "".join((match[1] if match[1] is not None else match[2]).split())), match.end()


def _repeating(text: str, match: re.Match[str]) -> tuple[Token, int]:
    """0.1\\overline{6} as one token `0.1~6`."""
    end = text.index("}", match.end()) if "}" in text[match.end() :] else -1
    digits = text[match.end() + len(r"\overline{") : end].strip()
    if end < 0 or not digits.isdigit() or "." not in match[0]:
        raise NotMath("an overline")
    return Token(NUMBER, f"{match[0].replace(',', '')}~{digits}"), end + 1


def _command(text: str, position: int) -> tuple[Token | None, int]:
    if text.startswith(("\\{", "\\}", "\\|"), position):
        sign = text[position : position + 2]
        return Token(SIGN, "|" if sign == "\\|" else sign), position + 2
    if text.startswith("\\\\", position):
        return Token(SIGN, "\\\\"), position + 2
    if match := _MATRIX.match(text, position):
        return Token(SIGN, "begin"), match.end()
    if match := _END.match(text, position):
        return Token(SIGN, "end"), match.end()
    match = re.compile(r"\\([a-zA-Z]+)\*?").match(text, position)
    if match is None:
        raise NotMath("a lone backslash")
    name, end = match[1], match.end()
    if name in _TEXT:
        return _text(text, end)
    if name in _FONTS:
        return _font(text, name, end)
    if name in _RELATIONS:
        return Token(SIGN, _RELATIONS[name]), end
    if name in FUNCTIONS or name in CONSTANTS or name in GREEK:
        return Token(NAME, name), end
    raise NotMath(f"the command \\{name}")


def _text(text: str, position: int) -> tuple[Token | None, int]:
    match = re.compile(r"\s*\{([^{}]*)\}").match(text, position)
    if match is None:
        raise NotMath("\\text without braces")
    words = match[1].strip()
    return (Token(WORD, words) if words else None), match.end()


def _font(text: str, name: str, position: int) -> tuple[Token | None, int]:
    """A font command vanishes; what it holds is read as math, or as one symbol behind an accent."""
    match = re.compile(r"\s*\{\s*([A-Za-z]+)\s*\}").match(text, position)
    if match is None:
        return None, position
    letters = match[1]
    if name in ("operatorname", "mathrm") and letters in FUNCTIONS:
        return Token(NAME, letters), match.end()
    if name in ("mathrm", "mathbf", "mathit", "boxed", "fbox") and len(letters) == 1:
        return Token(SYMBOL, letters), match.end()
    if name in ("mathrm", "boxed", "fbox", "operatorname", "mathbf"):
        return _letters(text, match.start(1))[0], match.end()
    return Token(SYMBOL, f"{name}:{letters}"), match.end()


def _letters(text: str, position: int) -> tuple[Token, int]:
    match = re.compile(r"[^\W\d_]+").match(text, position)
    assert match is not None
    run = match[0]
    if run in FUNCTIONS or run in CONSTANTS or (run in GREEK and len(run) > 2):
        return Token(NAME, run), match.end()
    is_shouted = len(run) > 1 and run.isupper()  # NO is a segment, no is a word
    if (run.casefold() in _SHORT_WORDS and not is_shouted) or len(run) >= 4 or not run.isascii():
        return Token(WORD, run), match.end()
    for name in (*FUNCTIONS, "pi"):  # xsin, 2pir
        if run.startswith(name):
            return Token(NAME, name), position + len(name)
    return Token(SYMBOL, run[0]), position + 1
