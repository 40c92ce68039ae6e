"""Finding the answer in a completion. Every policy is explicit; the first one that finds an answer decides."""

from __future__ import annotations

import re
from dataclasses import dataclass

POLICIES = ("hash", "boxed", "answer_tag", "last_number")

_HASH = re.compile(r"^[ \t]*####[ \t]*(\S[^\n]*)$", re.MULTILINE)
_TAG = re.compile(r"<answer>([^<>]*)</answer>")
_NUMBER = re.compile(r"(?<![\w.])[-\u2212]?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?(?![\w])")


@dataclass(frozen=True, slots=True)
class Extracted:
    answer: str | None  # None: nothing found
    reason: str  # the policy that found it, or why there is none


def extract_answer(text: str, policies: tuple[str, ...]) -> Extracted:
    """The answer by the first policy that finds one.

    hash: the last line `#### x`. boxed: the last `\\boxed{x}`; several boxes with different contents are no answer.
    answer_tag: the last `<answer>x</answer>`. last_number: the last number in the text.
    """
    for policy in policies:
        found = _FINDERS[policy](text)
        if found is not None:
            return found
    return Extracted(None, f"no answer by {', '.join(policies)}")


def _by_hash(text: str) -> Extracted | None:
    found = _HASH.findall(text)
    return Extracted(found[-1].strip(), "hash") if found else None


def _by_boxed(text: str) -> Extracted | None:
    boxes = boxed_contents(text)
    if not boxes:
        return None
    if len({"".join(box.split()) for box in boxes}) > 1:
        return Extracted(None, f"{len(boxes)} boxed answers that differ")
    return Extracted(boxes[-1].strip(), "boxed")


def _by_tag(text: str) -> Extracted | None:
    found = _TAG.findall(text)
    return Extracted(found[-1].strip(), "answer_tag") if found else None


def _by_last_number(text: str) -> Extracted | None:
    found = _NUMBER.findall(text)
    return Extracted(found[-1], "last_number") if found else None


_FINDERS = {"hash": _by_hash, "boxed": _by_boxed, "answer_tag": _by_tag, "last_number": _by_last_number}


def boxed_contents(text: str) -> list[str]:
    """Contents of every `\\boxed{...}` with balanced braces, in order. Linear in the text's length."""
    contents: list[str] = []
    start = text.find("\\boxed{")
    while start >= 0:
        depth, begin = 1, start + len("\\boxed{")
        position = begin
        while position < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            position += 1
        if depth:
            break
        contents.append(text[begin : position - 1])
        start = text.find("\\boxed{", position)
    return contents
