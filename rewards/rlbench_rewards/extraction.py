"""Finding the answer in a completion. Every policy is explicit; the first one that finds an answer decides.

All policies take time linear in the text's length, whatever the text is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

POLICIES = ("hash", "boxed", "answer_tag", "final_answer", "latex", "last_number")

_HASH = re.compile(r"^[ \t]*####[ \t]*(\S[^\n]*)$", re.MULTILINE)
_TAG = re.compile(r"<answer>([^<>]*)</answer>")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_FINAL = re.compile(r"answer(?:\s+is|\s*:)\s*:?[ \t*]*", re.IGNORECASE)
_UNIT = re.compile(r"(?!(?:st|nd|rd|th|d|D|x)\b)[a-zA-Z]{1,3}[²³]?(?!\w)")
_SENTENCE_END = re.compile(r"\.(?=\s+[A-Z<]|\s*$)")
_SPAN_MARK = re.compile(r"\$\$|(?<!\\)\$|\\\(|\\\)|\\\[|\\\]")
_SPAN_END = {"$$": "$$", "$": "$", "\\(": "\\)", "\\[": "\\]"}
_NUMBER_RUN = re.compile(r"[-\u2212$.\d][\d,./%$]*+")
_NUMBER = re.compile(r"[-\u2212]?\$?[-\u2212]?(?:\d[\d,]*+(?:\.\d++)?+(?:/\d++)?+|\.\d++)%?")


@dataclass(frozen=True, slots=True)
class Extracted:
    answer: str | None  # None: nothing found; of several boxes the last one
    reason: str  # the policy that found it, or why there is none
    boxes: tuple[str, ...] = ()  # contents of all boxes in order, where "boxed" decided


def without_reasoning(text: str, start: str = "<think>", end: str = "</think>") -> str | None:
    """The text behind the last `end`; all of it if there is neither mark; None if reasoning begins and never ends."""
    if end in text:
        return text.rsplit(end, 1)[1]
    return None if start in text else text


def extract_answer(text: str, policies: tuple[str, ...]) -> Extracted:
    """The answer by the first policy that finds one.

    hash: the last line `#### x`. boxed: the last `\\boxed{x}`. answer_tag: the last `<answer>x</answer>`.
    final_answer: behind the last "answer is" or "answer:", to the end of the sentence. latex: the last `$x$`, `\\(x\\)`
    or `\\[x\\]`. last_number: the last number in the text.
    """
    for policy in policies:
        found = _FINDERS[policy](text)
        if found is not None:
            return found
    return Extracted(None, f"no answer by {', '.join(policies)}")


def state_answer(answer: str, policy: str) -> str:
    """A completion in which the policy finds the answer."""
    forms = {
        "hash": "#### {}",
        "boxed": "\\boxed{{{}}}",
        "answer_tag": "<answer>{}</answer>",
        "final_answer": "The answer is {}",
        "latex": "${}$",
        "last_number": "{}",
    }
    return forms[policy].format(answer)


def _by_hash(text: str) -> Extracted | None:
    found = _HASH.findall(text)
    return Extracted(found[-1].strip(), "hash") if found else None


def _by_boxed(text: str) -> Extracted | None:
    boxes = boxed_contents(text)
    return Extracted(boxes[-1].strip(), "boxed", tuple(box.strip() for box in boxes)) if boxes else None


def _by_tag(text: str) -> Extracted | None:
    found = _TAG.findall(text)
    return Extracted(found[-1].strip(), "answer_tag") if found else None


def _by_final_answer(text: str) -> Extracted | None:
    marks = list(_FINAL.finditer(text))
    if not marks:
        return None
    line = text[marks[-1].end() :].split("\n", 1)[0]
    sentence = _SENTENCE_END.split(line, maxsplit=1)[0]
    answer = re.split(r"\b(?:is|are)\b", sentence)[-1].strip().strip('"*:').strip()
    return Extracted(answer, "final_answer") if answer else None


def _by_latex(text: str) -> Extracted | None:
    spans = math_spans(text)
    return Extracted(spans[-1], "latex") if spans else None


def _by_last_number(text: str) -> Extracted | None:
    last = None
    for run in _NUMBER_RUN.finditer(text):
        before = text[run.start() - 1] if run.start() else ""
        after = text[run.end() : run.end() + 1]
        number = _NUMBER.match(run[0])
        is_whole = number is not None and not run[0][number.end() :].strip(".,$/%")
        ends_word = not (after.isalnum() or after == "_") or _UNIT.match(text, run.end()) is not None
        if is_whole and ends_word and not (before.isalnum() or (before and before in "._")):
            last = number[0] if number else last
    return Extracted(last.rstrip(","), "last_number") if last else None


_FINDERS: dict[str, Callable[[str], Extracted | None]] = {
    "hash": _by_hash,
    "boxed": _by_boxed,
    "answer_tag": _by_tag,
    "final_answer": _by_final_answer,
    "latex": _by_latex,
    "last_number": _by_last_number,
}


def boxed_contents(text: str) -> list[str]:
    """Contents of every `\\boxed{...}` with balanced braces, in order; a box in a box is part of the outer one."""
    contents: list[str] = []
    position = 0
    while match := _BOX.search(text, position):
        end = _end_of_braces(text, match.end())
        if end < 0:
            break
        contents.append(text[match.end() : end])
        position = end + 1
    return contents


def _end_of_braces(text: str, begin: int) -> int:
    """Position of the brace that closes what began before `begin`, or -1."""
    depth, position = 1, begin
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 2
            continue
        depth += (char == "{") - (char == "}")
        if not depth:
            return position
        position += 1
    return -1


def math_spans(text: str) -> list[str]:
    """Contents of `$x$`, `$$x$$`, `\\(x\\)` and `\\[x\\]` that are not empty, in order."""
    spans, opened = [], None
    for mark in _SPAN_MARK.finditer(text):
        if opened is None:
            opened = mark if mark[0] in _SPAN_END else None
        elif mark[0] == _SPAN_END[opened[0]]:
            content = text[opened.end() : mark.start()].strip()
            opened = None
            if content:
                spans.append(content)
    return spans
