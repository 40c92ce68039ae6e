"""Whether a completion keeps to one script: the share of its letters that belong to it."""

from __future__ import annotations

import re
import unicodedata

from rlbench_rewards.contract import RewardOutput, RewardSample, UnitCase

SCRIPTS = {
    "latin": ("LATIN",), "greek": ("GREEK",), "cyrillic": ("CYRILLIC",), "arabic": ("ARABIC",), "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",), "thai": ("THAI",), "hangul": ("HANGUL",), "han": ("CJK",),
    "japanese": ("HIRAGANA", "KATAKANA", "CJK"),
}  # fmt: skip
_OPENING = re.compile(r"```|\$\$|\$[^$\n]*\$|\\\(|\\\[")
_CLOSING = {"```": "```", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}


class ScriptConsistency:
    """Share of the letters, outside of code blocks and formulas, that are of the script; 1.0 if there is no letter.

    Args:
        script: one of SCRIPTS; "latin" for English, "han" for Chinese.
        min_share: a share below it scores 0.0, so that a foreign word costs nothing by itself or everything.

    Raises:
        ValueError: an unknown script.

    Source: language consistency as a share of the target language's words, DeepSeek-R1, arXiv:2501.12948, section
    2.3.2; here by script, which needs no language model.
    """

    def __init__(self, script: str = "latin", min_share: float = 0.0) -> None:
        if script not in SCRIPTS:
            raise ValueError(f"script is {script!r}, expected one of: {', '.join(SCRIPTS)}")
        self._prefixes, self._min_share, self._script = SCRIPTS[script], min_share, script

    def __call__(self, sample: RewardSample) -> RewardOutput:
        letters = [char for char in _prose(sample.completion) if char.isalpha()]
        if not letters:
            return RewardOutput(value=1.0, details={"num_letters": 0})
        share = sum(unicodedata.name(char, "").startswith(self._prefixes) for char in letters) / len(letters)
        return RewardOutput(value=share if share >= self._min_share else 0.0, details={"share": share})

    def unit_cases(self) -> list[UnitCase]:
        other = "слово" if self._script != "cyrillic" else "word"
        return [UnitCase(completion="1 + 2 = 3", expected=1.0), UnitCase(completion=other, expected=0.0)]


def _prose(text: str) -> str:
    """The text without code blocks and formulas, in one pass: a mark that is never closed is looked for once."""
    parts: list[str] = []
    kept_from = position = 0
    unclosed: set[str] = set()
    while (opening := _OPENING.search(text, position)) is not None:
        closing = _CLOSING.get(opening[0])  # None: $...$ as a whole
        end = opening.end() if closing is None or opening[0] in unclosed else text.find(closing, opening.end())
        if end < 0:
            unclosed.add(opening[0])
        if opening[0] in unclosed:
            position = opening.end()
            continue
        parts.append(text[kept_from : opening.start()])
        kept_from = position = end + len(closing or "")
    return " ".join([*parts, text[kept_from:]])
