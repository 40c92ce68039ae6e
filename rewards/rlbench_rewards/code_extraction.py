"""The program in a completion."""

from __future__ import annotations

import re

POLICIES = ("last", "first", "longest")

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)
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
    blocks = [text for _, language, text in _FENCE.findall(answer) if language.lower() in _PYTHON]
    if blocks:
        return {"last": blocks[-1], "first": blocks[0], "longest": max(blocks, key=len)}[policy]
    if "```" in answer or not answer.strip():
        return None
    return answer


def suspicious_marks(code: str) -> dict[str, int]:
    """How often each suspicious mark occurs, of those that do."""
    counts = {name: len(re.findall(pattern, code)) for name, pattern in _SUSPICIOUS.items()}
    return {name: count for name, count in counts.items() if count}
