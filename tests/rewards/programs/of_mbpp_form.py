# ruff: noqa: B905
"""Tasks of MBPP's form: a function, and assertions on it; see `rows.py`."""

import heapq
import re


def sum_of_cubes(n):
    """Write a function that adds the cubes of the first n whole numbers."""
    return sum(i**3 for i in range(1, n + 1))


def check_sum_of_cubes(candidate):
    assert candidate(3) == 36
    assert candidate(1) == 1
    assert candidate(0) == 0
    assert candidate(10) == 3025


def smallest_of(numbers, count):
    """Write a function that finds the smallest numbers of a list, in order."""
    return heapq.nsmallest(count, numbers)


def check_smallest_of(candidate):
    assert candidate([5, 2, 8, 1], 2) == [1, 2]
    assert candidate([3], 2) == [3]
    assert candidate([], 1) == []


def is_time(text):
    """Write a function that says whether a text is a time of day such as 09:30."""
    return re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", text) is not None


def check_is_time(candidate):
    assert candidate("09:30") == True  # noqa: E712
    assert candidate("24:00") == False  # noqa: E712
    assert candidate("9:30") is False
    assert candidate("23:59") is True


def shared_items(a, b):
    """Write a function that gives the items that are in both tuples, as a set."""
    return set(a) & set(b)


def check_shared_items(candidate):
    assert candidate((1, 2, 3), (2, 3, 4)) == {2, 3}
    assert set(candidate((1,), (2,))) == set()
    assert candidate((5, 5), (5,)) == {5}


def count_bits(n):
    """Write a function that counts the ones of a whole number in binary."""
    count = 0
    for place in range(n.bit_length()):
        count += n >> place & 1
    return count


def check_count_bits(candidate):
    assert candidate(7) == 3
    assert candidate(8) == 1
    assert candidate(0) == 0
    assert candidate(2**39 + 1) == 2


def area_of(points):
    """Write a function that finds the area of a polygon from its corners."""
    total = 0
    for (x1, y1), (x2, y2) in zip(points, points[1:] + [points[0]]):
        total += x1 * y2 - x2 * y1
    return abs(total) / 2


def check_area_of(candidate):
    assert candidate([(0, 0), (2, 0), (2, 3), (0, 3)]) == 6.0
    assert candidate([(0, 0), (0, 1), (1, 0)]) == 0.5
    assert abs(candidate([(1, 1), (4, 2), (3, 6)]) - 6.5) < 1e-9


def swapped_case(text):
    """Write a function that makes small letters large and large letters small."""
    return "".join(letter.lower() if letter.isupper() else letter.upper() for letter in text)


def check_swapped_case(candidate):
    assert candidate("aB1") == "Ab1"
    assert candidate("") == ""
    assert candidate("Zz") == "zZ"
