# ruff: noqa: B905
"""Tasks of HumanEval's form on numbers: a function, and the check that goes with it; see `rows.py`."""

import datetime
import math
from functools import reduce


def digital_root(n: int) -> int:
    """Sum the digits of n, and those of the sum, until one digit is left.

    >>> digital_root(987)
    6
    """
    while n > 9:
        n = sum(int(digit) for digit in str(n))
    return n


def check_digital_root(candidate):
    assert candidate(987) == 6
    assert candidate(0) == 0 and candidate(9) == 9 and candidate(10) == 1
    for n in range(1, 200):
        assert candidate(n) == 1 + (n - 1) % 9


def next_multiple(n: int, k: int) -> int:
    """The smallest multiple of k (k > 0) that is larger than n."""
    return (n // k + 1) * k


def check_next_multiple(candidate):
    assert candidate(7, 5) == 10
    assert candidate(10, 5) == 15
    assert candidate(-1, 4) == 0
    assert candidate(0, 1) == 1


def collatz_steps(n: int) -> int:
    """How many steps n takes to 1 if even numbers are halved and odd ones become 3 n + 1; -1 if it is 500 or more."""
    for steps in range(500):
        if n == 1:
            return steps
        n = 3 * n + 1 if n % 2 else n // 2
    return -1


def check_collatz_steps(candidate):
    assert [candidate(n) for n in range(1, 10)] == [0, 1, 7, 2, 5, 8, 16, 3, 19]
    assert candidate(27) == 111
    assert candidate(2**499) == 499 and candidate(2**500) == -1


def factorial_zeros(n: int) -> int:
    """How many zeros n! ends with."""
    total = 0
    while n > 0:
        n //= 5
        total += n
    return total


def check_factorial_zeros(candidate):
    import math

    for n in range(0, 130, 3):
        text = str(math.factorial(n))
        assert candidate(n) == len(text) - len(text.rstrip("0")), f"of {n}!"
    assert candidate(10**6) == 249998


def in_base(n: int, base: int) -> str:
    """Write n >= 0 in a base from 2 to 16, with the digits 0 to f.

    >>> in_base(255, 16)
    'ff'
    """
    if n < base:
        return "0123456789abcdef"[n]
    return in_base(n // base, base) + in_base(n % base, base)


def check_in_base(candidate):
    assert candidate(255, 16) == "ff" and candidate(0, 7) == "0"
    for n in range(0, 3000, 37):
        for base in (2, 3, 10, 16):
            assert int(candidate(n, base), base) == n
    assert candidate(8, 2) == "1000"


def roman_value(text: str) -> int:
    """The value of a Roman numeral in capital letters."""
    values = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
    total = 0
    for here, after in zip(text, text[1:] + " "):
        value = values[here]
        total += -value if value < values.get(after, 0) else value
    return total


def check_roman_value(candidate):
    assert candidate("III") == 3 and candidate("IX") == 9 and candidate("MCMXCIV") == 1994
    assert candidate("CDXLIV") == 444 and candidate("DLV") == 555


def gcd_of_all(numbers: list) -> int:
    """The greatest common divisor of all numbers; 0 of none."""
    return reduce(math.gcd, numbers, 0)


def check_gcd_of_all(candidate):
    assert candidate([12, 18, 30]) == 6
    assert candidate([]) == 0
    assert candidate([7]) == 7 and candidate([4, 9]) == 1


def clamp(x: float, low: float, high: float) -> float:
    """x, or the nearer end of the range from low to high if x lies outside.

    >>> clamp(11, 0, 10)
    10
    """
    if x < low:
        return low
    if x > high:
        return high
    return x


def check_clamp(candidate):
    assert candidate(11, 0, 10) == 10 and candidate(-3, 0, 10) == 0
    assert candidate(4.5, 0, 10) == 4.5
    assert candidate(0, 0, 10) == 0 and candidate(10, 0, 10) == 10


def triangle_kind(a: int, b: int, c: int) -> str:
    """ "none", "equilateral", "isosceles" or "scalene", by the lengths of the sides."""
    a, b, c = sorted((a, b, c))
    if a <= 0 or a + b <= c:
        return "none"
    if a == c:
        return "equilateral"
    return "isosceles" if a == b or b == c else "scalene"


def check_triangle_kind(candidate):
    assert candidate(3, 4, 5) == "scalene"
    assert candidate(2, 2, 2) == "equilateral" and candidate(1, 1, 1) == "equilateral"
    assert candidate(5, 3, 5) == "isosceles" and candidate(2, 2, 3) == "isosceles"
    assert candidate(1, 2, 3) == "none" and candidate(0, 1, 1) == "none" and candidate(9, 1, 2) == "none"


def weighted_mean(values: list, weights: list) -> float:
    """The mean of the values, each as often as its weight says; 0.0 if all weights are 0."""
    total = sum(weights)
    if total == 0:
        return 0.0
    return sum(value * weight for value, weight in zip(values, weights)) / total


def check_weighted_mean(candidate):
    assert abs(candidate([1.0, 2.0, 4.0], [1, 1, 2]) - 2.75) < 1e-9
    assert candidate([5.0], [0]) == 0.0
    assert abs(candidate([0.1, 0.3], [3, 1]) - 0.15) < 1e-9


def balance_after(amount: float, rate: float, years: int) -> float:
    """What an amount grows to with yearly interest, rounded to cents.

    >>> balance_after(100, 0.05, 2)
    110.25
    """
    for _ in range(years):
        amount *= 1 + rate
    return round(amount, 2)


def check_balance_after(candidate):
    assert candidate(100, 0.05, 2) == 110.25
    assert candidate(1000, 0.0, 9) == 1000
    assert abs(candidate(1, 0.07, 10) - 1.97) < 1e-9


def is_leap(year: int) -> bool:
    """Whether the year of the Gregorian calendar has 366 days."""
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def check_is_leap(candidate):
    import datetime

    for year in range(1880, 2110):
        days = (datetime.date(year + 1, 1, 1) - datetime.date(year, 1, 1)).days
        assert candidate(year) == (days == 366)
    assert candidate(2000) is True and candidate(1900) is False


def weekdays_between(first: str, last: str) -> int:
    """How many days from Monday to Friday lie from first to last, both included, written as 2024-02-29."""
    day, end = datetime.date.fromisoformat(first), datetime.date.fromisoformat(last)
    count = 0
    while day <= end:
        if day.weekday() < 5:
            count += 1
        day += datetime.timedelta(days=1)
    return count


def check_weekdays_between(candidate):
    assert candidate("2024-02-26", "2024-03-03") == 5
    assert candidate("2024-03-02", "2024-03-03") == 0
    assert candidate("2024-03-01", "2024-03-01") == 1
    assert candidate("2024-03-01", "2024-03-31") == 21


def value_at(coefficients: list, x: float) -> float:
    """The polynomial at x, the coefficient of the lowest power first."""
    return sum(coefficient * x**power for power, coefficient in enumerate(coefficients))


def root_between(coefficients: list, low: float, high: float) -> float:
    """A root of the polynomial between low and high, where value_at is negative at low and positive at high."""
    for _ in range(60):
        middle = (low + high) / 2
        if value_at(coefficients, middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def check_root_between(candidate):
    import copy
    import random

    rng = random.Random(42)
    for _ in range(20):
        coefficients = [-rng.randint(1, 9), rng.randint(1, 9), 0, rng.randint(1, 9)]
        root = candidate(copy.deepcopy(coefficients), 0, 10)
        assert abs(value_at(coefficients, root)) < 1e-6
