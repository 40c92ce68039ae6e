"""Tasks of HumanEval's form on text: a function, and the check that goes with it; see `rows.py`."""

import re


def shifted_back(text: str, by: int) -> str:
    """Small letters, each moved back by as many places of the alphabet."""
    return "".join(chr((ord(letter) - ord("a") - by) % 26 + ord("a")) for letter in text)


def shifted(text: str, by: int) -> str:
    """Move each small letter on by as many places of the alphabet; shifted_back undoes it."""
    return "".join(chr((ord(letter) - ord("a") + by) % 26 + ord("a")) for letter in text)


def check_shifted(candidate):
    import random
    import string

    rng = random.Random(7)
    assert candidate("xyz", 3) == "abc"
    for _ in range(30):
        text = "".join(rng.choice(string.ascii_lowercase) for _ in range(12))
        assert shifted_back(candidate(text, 5), 5) == text


def run_lengths(text: str) -> list:
    """Runs of the same letter as pairs of the letter and its number.

    >>> run_lengths("aab")
    [('a', 2), ('b', 1)]
    """
    runs = []
    for letter in text:
        if runs and runs[-1][0] == letter:
            runs[-1] = (letter, runs[-1][1] + 1)
        else:
            runs.append((letter, 1))
    return runs


def check_run_lengths(candidate):
    assert candidate("aab") == [("a", 2), ("b", 1)]
    assert candidate("") == []
    assert candidate("xyyyx") == [("x", 1), ("y", 3), ("x", 1)]


def expanded(pattern: str) -> str:
    """Repeat each letter as often as the number behind it says: a3b becomes aaab."""
    return re.sub(r"([a-z])(\d+)", lambda match: match[1] * int(match[2]), pattern)


def check_expanded(candidate):
    assert candidate("a3b") == "aaab"
    assert candidate("x10") == "x" * 10 and candidate("a0b2") == "bb"
    assert candidate("") == ""


def acronym(phrase: str) -> str:
    """The capital first letters of the words, which blanks or hyphens separate."""
    return "".join(word[0].upper() for word in phrase.replace("-", " ").split())


def check_acronym(candidate):
    assert candidate("portable network graphics") == "PNG"
    assert candidate("first in, first-out") == "FIFO"
    assert candidate("  ") == ""


def masked(address: str) -> str:
    """Hide the name of an address but for its first and last letter; names of at most two letters wholly."""
    name, _, host = address.partition("@")
    if len(name) <= 2:
        return "*" * len(name) + "@" + host
    return name[0] + "*" * (len(name) - 2) + name[-1] + "@" + host


def check_masked(candidate):
    assert candidate("alice@example.org") == "a***e@example.org"
    assert candidate("bo@x.y") == "**@x.y" and candidate("a@x.y") == "*@x.y"
    assert candidate("ann@x.y") == "a*n@x.y"


def is_balanced(text: str) -> bool:
    """Whether round, square and curly brackets are closed in the order in which they were opened."""
    pairs = {")": "(", "]": "[", "}": "{"}
    stack = []
    for letter in text:
        if letter in "([{":
            stack.append(letter)
        elif letter in pairs:
            if not stack or stack.pop() != pairs[letter]:
                return False
    return not stack


def check_is_balanced(candidate):
    assert candidate("a(b[c]{d})") and candidate("") and candidate("()[]")
    assert not candidate("(]") and not candidate("(") and not candidate(")") and not candidate("([)]")
    assert candidate("{x}") == True  # noqa: E712
    assert candidate("}{") is False


def longest_word(text: str):
    """The longest word, the first of several; None if there is no word."""
    best = None
    for word in text.split():
        if best is None or len(word) > len(best):
            best = word
    return best


def check_longest_word(candidate):
    assert candidate("a bcd ef ghi") == "bcd"
    assert candidate("") is None
    assert candidate("one") == "one" and candidate("x yy") == "yy"


def title(text: str) -> str:
    """Capitalise all words but "of", "the" and "and"; the first word always."""
    small = {"of", "the", "and"}
    words = text.lower().split()
    return " ".join(w if w in small and i > 0 else w.capitalize() for i, w in enumerate(words))


def check_title(candidate):
    assert candidate("the lord OF the rings") == "The Lord of the Rings"
    assert candidate("salt and pepper") == "Salt and Pepper"
    assert candidate("") == ""


def vowel_groups(text: str) -> int:
    """How many groups of neighbouring vowels (a, e, i, o, u) the text has."""
    count, was_vowel = 0, False
    for letter in text.lower():
        is_vowel = letter in "aeiou"
        if is_vowel and not was_vowel:
            count += 1
        was_vowel = is_vowel
    return count


def check_vowel_groups(candidate):
    assert candidate("queue") == 1 and candidate("banana") == 3
    assert candidate("") == 0 and candidate("Xyz") == 0
    assert candidate("AI for you") == 3


def rgb(color: str) -> tuple:
    """Red, green and blue of a color such as #ff8000 or #f80; ValueError for anything else.

    >>> rgb("#f80")
    (255, 136, 0)
    """
    digits = color[1:]
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    if not re.fullmatch(r"#[0-9a-f]{6}", "#" + digits) or color[0] != "#":
        raise ValueError(f"no color: {color}")
    return tuple(int(digits[start : start + 2], 16) for start in range(0, 6, 2))


def check_rgb(candidate):
    assert candidate("#f80") == (255, 136, 0)
    assert candidate("#0a0b0c") == (10, 11, 12)
    for wrong in ("#ff", "ff8000", "#ggg"):
        try:
            candidate(wrong)
        except ValueError as error:
            assert str(error) == f"no color: {wrong}"
        else:
            raise AssertionError(f"{wrong} was taken")


def seconds(duration: str) -> int:
    """The seconds of a duration such as 1h30m or 45s."""
    sizes = {"h": 3600, "m": 60, "s": 1}
    return sum(int(number) * sizes[unit] for number, unit in re.findall(r"(\d+)([hms])", duration))


def check_seconds(candidate):
    assert candidate("1h30m") == 5400
    assert candidate("45s") == 45 and candidate("2h1s") == 7201 and candidate("") == 0


def lines_of(text: str, width: int) -> list:
    """Words put on lines of at most width letters, as many on each as fit."""
    lines = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += " " + word
        else:
            lines.append(word)
    return lines


def check_lines_of(candidate):
    assert candidate("a bb ccc dddd", 4) == ["a bb", "ccc", "dddd"]
    assert candidate("", 5) == [] and candidate("toolong x", 3) == ["toolong", "x"]
    assert candidate("ab cd ef", 5) == ["ab cd", "ef"] and candidate("ab cde", 4) == ["ab", "cde"]


def common_prefix(words: list) -> str:
    """The longest text that all words begin with; "" of no words."""
    if not words:
        return ""
    shortest = min(words, key=len)
    for index, letter in enumerate(shortest):
        if any(word[index] != letter for word in words):
            return shortest[:index]
    return shortest


def check_common_prefix(candidate):
    assert candidate(["interval", "internal", "into"]) == "int"
    assert candidate([]) == "" and candidate(["abc"]) == "abc" and candidate(["a", "b"]) == ""
    assert candidate(["ab", "abc"]) == "ab"


def differing(a: str, b: str) -> list:
    """Places, from 0, at which two texts differ; what one lacks differs."""
    short = min(len(a), len(b))
    places = [index for index in range(short) if a[index] != b[index]]
    return places + list(range(short, max(len(a), len(b))))


def check_differing(candidate):
    assert candidate("abcd", "abxd") == [2]
    assert candidate("ab", "ab") == [] and candidate("", "xy") == [0, 1]
    assert candidate("axc", "ab") == [1, 2]
