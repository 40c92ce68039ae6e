"""Units behind a value are dropped; words that change the value are applied; any other word makes it no answer."""

from __future__ import annotations

from rlbench_rewards.answers.tokens import NUMBER, SIGN, SYMBOL, WORD, NotMath, Token

_MULTIPLIERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_PERCENT = ("percent", "pct", "percentage", "percentagepoints")
_DENIED = frozenset(
    "not no is isnt are was wrong incorrect false if but except unless when to than or and less more least most about "
    "around nearly approximately roughly almost between then else maybe minus plus times dozen half double pairs"
    " twice pair score gross import print return open eval exec".split()
)
_LETTERS = ("m", "s", "g", "h", "L", "l", "N", "J", "W", "V", "A", "K", "C", "F")
_MAX_WORDS = 3


def drop_unit(tokens: list[Token]) -> list[Token]:
    """`tokens` without trailing unit words (`5 cm^2`, `60 miles per hour`, `3 km/h`, `7 m`).

    Raises:
        NotMath: a trailing word that is no unit ("not", "less"), or more than three words.
    """
    first = next((index for index, token in enumerate(tokens) if token.kind == WORD), None)
    if first is None:
        return _drop_letter(tokens)
    head, tail = tokens[:first], tokens[first:]
    if not head:
        raise NotMath("words in front of the value")
    words = [token for token in tail if token.kind == WORD]
    names = [part.casefold() for token in words for part in token.text.split()]
    is_unit_text = all(token.kind in (WORD, NUMBER, SYMBOL) or token.text in ("^", "{", "}", "/", "-", "*", "(", ")")
                       for token in tail)  # fmt: skip
    if not is_unit_text or any(name.strip("().,'") in _DENIED for name in names) or len(names) > _MAX_WORDS:
        raise NotMath("words that are no unit")
    if any(token.kind == NUMBER and token.text not in ("2", "3") for token in tail):
        raise NotMath("a number behind a word")
    if "".join(names) in _PERCENT:
        return [*head, Token(SIGN, "%")]
    powers = [_MULTIPLIERS[name] for name in names if name in _MULTIPLIERS]
    if len(powers) > 1:
        raise NotMath("several number words")
    if powers:
        if names[0] not in _MULTIPLIERS:
            raise NotMath("a number word behind a unit")
        return [*head, Token(SIGN, "*"), Token(NUMBER, str(10 ** powers[0]))]
    while head and head[-1].kind == SIGN and head[-1].text in ("/", "-"):  # 5-foot, 60 /hour
        head = head[:-1]
    if not head:
        raise NotMath("words in front of the value")
    return head


def _drop_letter(tokens: list[Token]) -> list[Token]:
    """`7 m`, `7 m^2`, `9.8 m/s^2`: one-letter units behind a number and a blank."""
    if len(tokens) < 2 or tokens[0].kind != NUMBER or not tokens[1].has_blank_before:
        return tokens
    tail = tokens[1:]
    texts = [token.text for token in tail if token.text not in ("{", "}")]
    shapes = (["u"], ["u", "^", "n"], ["u", "/", "u"], ["u", "/", "u", "^", "n"])
    shape = ["u" if t in _LETTERS else "n" if t in ("2", "3") else t for t in texts]
    return tokens[:1] if shape in shapes else tokens
