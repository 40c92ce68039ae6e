"""No reward takes long over 64 KiB, whatever they are: a slow one would be killed, and its rollout lost."""

import random
import re
import time

import pytest

from rlbench_rewards import RewardSample
from rlbench_rewards.answer_format import AnswerFormat
from rlbench_rewards.code_extraction import POLICIES, extract_program
from rlbench_rewards.countdown import Countdown
from rlbench_rewards.json_schema import JsonSchema
from rlbench_rewards.json_text import fenced_json, whole_json
from rlbench_rewards.language import ScriptConsistency, _prose
from rlbench_rewards.length import OverlongPenalty
from rlbench_rewards.multiple_choice import MultipleChoice
from rlbench_rewards.reasoning_task import ReasoningTask
from rlbench_rewards.repetition import RepetitionPenalty
from rlbench_rewards.tag_format import TagFormat
from rlbench_rewards.text_match import WAYS, TextMatch
from rlbench_rewards.tool_calls import ToolCalls
from rlbench_rewards.trial import ADVERSARIAL
from tests.rewards.math_texts import KIB_64, long_texts

LIMIT_S = 1.5  # the slowest takes 0.1 s on an idle core
PIECES = [
    "```json\n", "```python\n", "x```json\n", "~~~\n```\n", "\n```json\n{", "```a", "$$a", "$a\n", "\\(a", "\\[",
    "\\[ \\( $$ ```",
    "[", '{"a":', "<tool_call>", "<think>", "A ", "(A", "the answer is A ", "слово ", " \n", "\u0301",
]  # fmt: skip
TEXTS = [*long_texts(random.Random(2)), *ADVERSARIAL.values(), *(p * (KIB_64 // len(p)) for p in PIECES)]
ROW = {"answer": "B", "numbers": [1, 2], "target": 3, "metadata": {"difficulty": {}}}
REWARDS = {
    **{f"text {way}": TextMatch(way, extract=["answer_tag", "last_number"]) for way in WAYS},
    **{f"whole text {way}": TextMatch(way) for way in WAYS},
    **{f"form {form}": AnswerFormat(form) for form in ("hash", "boxed", "answer_tag")},
    **{f"JSON {where}": JsonSchema(schema={}, where=where) for where in ("whole", "fenced")},
    "choice": MultipleChoice(),
    "tags": TagFormat(allow_text_around=True),
    "tools": ToolCalls(tools=[{"name": "a"}]),
    "length": OverlongPenalty(10, unit="words"),
    "repetition": RepetitionPenalty(2),
    "language": ScriptConsistency(),
    "countdown": Countdown(),
    "task": ReasoningTask("chain_sum", extract=[]),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_is_quick_on_every_long_text(name):
    for text in TEXTS:
        start = time.monotonic()
        REWARDS[name](RewardSample(prompt="q", completion=text, num_tokens=9, columns=ROW))
        assert time.monotonic() - start < LIMIT_S, ascii(text[:40])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_program_is_found_quickly_or_not_at_all(policy):
    for text in TEXTS:
        start = time.monotonic()
        extract_program(text, policy)
        assert time.monotonic() - start < LIMIT_S, ascii(text[:40])


def test_quick_ways_find_what_plain_patterns_find():
    """The patterns say in one line what is meant; on long texts they take for ever."""
    not_prose = re.compile(r"```.*?```|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]", re.DOTALL)
    fence = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n[ \t]*```", re.DOTALL)
    block = re.compile(r"^[ \t]*(```|~~~)[ \t]*([\w+#.-]*)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)
    rng = random.Random(4)
    pieces = ["```", "~~~", "```json\n", "```python", "\n", "\n", " ", "a", "1", "$", "$$", "\\(", "\\)", "\\[", "\\]"]
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 14)))
        letters = [[c for c in prose if c.isalpha()] for prose in (_prose(text), not_prose.sub(" ", text))]
        assert letters[0] == letters[1], repr(text)
        fenced = fence.findall(text)
        assert outcome(fenced_json, text) == outcome(whole_json, fenced[-1] if fenced else text), repr(text)
        if not re.search("`{4}|~{4}", text):
            programs = [code for _, language, code in block.findall(text) if language in ("", "python")]
            expected = programs[-1] if programs else None if "```" in text or not text.strip() else text
            assert extract_program(text) == expected, repr(text)


def outcome(read, text: str):
    try:
        return read(text)
    except ValueError as error:
        return str(error)
