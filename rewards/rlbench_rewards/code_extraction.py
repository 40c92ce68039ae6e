"""The program in a completion."""

from __future__ import annotations

import re
from bisect import bisect_right

POLICIES = ("last", "first", "longest")

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)")
_PYTHON = ("", "python", "python3", "py", "py3")
_END_OF_THOUGHT = "</think>"
_START_OF_THOUGHT = "<think>"

# Counted for the log, never for the verdict: they tell a researcher where to look.
_SUSPICIOUS = {
    "exit": r"\b(?:sys\.exit|os\._exit|quit|exit)\s*\(",
    "own_equality": r"\bdef __(?:eq|ne|bool|hash|lt|le|gt|ge)__",
    "frames": r"\b_getframe\b|\bf_back\b|\bcurrentframe\b",
    "garbage_collector": r"\bgc\.get_(?:objects|referrers)",
    "files": r"\bopen\s*\(|\bos\.(?:listdir|walk|scandir)",
    "system": r"\bos\.(?:system|popen|exec\w*|fork|kill)|\bsubprocess\b|\bctypes\b",
    "patching": r"\bbuiltins\b|\bsetattr\s*\(|__globals__|sys\.modules",
}


def extract_program(completion: str, policy: str = "last") -> str | None:
    """The Python in the completion, None without one.

    Reasoning up to `</think>` is left out, and an unfinished thought has no program. Of several fenced blocks in
    Python (or in no named language) the policy takes one; a completion without fences is a program as a whole.
    """
    answer = completion.rpartition(_END_OF_THOUGHT)[2]
    if _START_OF_THOUGHT in answer:
        return None
    blocks = [text for language, text in _fenced_blocks(answer) if language.lower() in _PYTHON]
    if blocks:
        return {"last": blocks[-1], "first": blocks[0], "longest": max(blocks, key=len)}[policy]
    if "```" in answer or not answer.strip():
        return None
    return answer


def _fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each block, in one pass; a fence that nothing closes opens none."""
    lines = text.split("\n")
    closings: dict[str, list[int]] = {}
    for number, line in enumerate(lines):
        mark = line.strip(" \t\r")
        if len(mark) >= 3 and mark[0] in "`~" and mark == mark[0] * len(mark):
            closings.setdefault(mark, []).append(number)
    blocks, number = [], 0
    while number < len(lines):
        opening = _FENCE.match(lines[number])
        ends = closings.get(opening[1], []) if opening else []
        place = bisect_right(ends, number)
        if opening is None or place == len(ends):
            number += 1
            continue
        content = lines[number + 1 : ends[place]]
        blocks.append((opening[2], "".join(f"{line}\n" for line in content)))
        number = ends[place] + 1
    return blocks


def suspicious_marks(code: str) -> dict[str, int]:
    """How often each suspicious mark occurs, of those that do."""
    counts = {name: len(re.findall(pattern, code)) for name, pattern in _SUSPICIOUS.items()}
    return {name: count for name, count in counts.items() if count}
