"""What an answer may cost. Everything above is refused before anything symbolic is built."""

from __future__ import annotations

MAX_CHARS = 2000
MAX_NESTING = 50
MAX_DIGITS = 1000
MAX_EXPONENT = 10_000
MAX_POWER_BITS = 40_000  # of a number that a power would make
MAX_POWER_HEIGHT = 2  # a^b^c; e^x counts
MAX_FACTORIAL = 1000
MAX_ITEMS = 200  # of a list, a set or a matrix


class AnswerTooBig(ValueError):
    """The answer is over a bound; its message says which."""


def check_text(text: str) -> None:
    """Raises: AnswerTooBig if the text is too long, nested too deeply or has too many digits."""
    if len(text) > MAX_CHARS:
        raise AnswerTooBig(f"longer than {MAX_CHARS} characters")
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        raise AnswerTooBig(f"nested deeper than {MAX_NESTING}")
    if sum(char.isdigit() for char in text) > MAX_DIGITS:
        raise AnswerTooBig(f"more than {MAX_DIGITS} digits")


def check_items(number: int) -> None:
    if number > MAX_ITEMS:
        raise AnswerTooBig(f"more than {MAX_ITEMS} items")


def check_power(base_bits: int, exponent: int) -> None:
    """Raises: AnswerTooBig for base^exponent of a number of `base_bits` bits."""
    if abs(exponent) > MAX_EXPONENT:
        raise AnswerTooBig(f"an exponent above {MAX_EXPONENT}")
    if base_bits * abs(exponent) > MAX_POWER_BITS:
        raise AnswerTooBig(f"a power of more than {MAX_POWER_BITS} bits")


def check_power_height(height: int) -> None:
    if height > MAX_POWER_HEIGHT:
        raise AnswerTooBig("a tower of exponents")


def check_factorial(argument: int) -> None:
    if not 0 <= argument <= MAX_FACTORIAL:
        raise AnswerTooBig(f"a factorial or binomial outside of 0 to {MAX_FACTORIAL}")
