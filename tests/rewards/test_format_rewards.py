"""Formats, lengths, choices, matches and tool calls: hand-made completions with the value they must have."""

import json

import pytest

from rlbench_rewards.contract import RewardError, RewardSample
from rlbench_rewards.json_schema import JsonSchema
from rlbench_rewards.language import ScriptConsistency
from rlbench_rewards.length import OverlongPenalty
from rlbench_rewards.multiple_choice import MultipleChoice
from rlbench_rewards.pattern_match import PatternMatch
from rlbench_rewards.repetition import RepetitionPenalty
from rlbench_rewards.stepwise import StepwiseReward
from rlbench_rewards.tag_format import TagFormat
from rlbench_rewards.text_match import TextMatch
from rlbench_rewards.tool_calls import ToolCalls


def value(reward, completion: str, *, num_tokens: int | None = None, is_truncated: bool = False, **columns) -> float:
    sample = RewardSample(
        prompt="", completion=completion, columns=columns, num_tokens=num_tokens, is_truncated=is_truncated
    )
    return reward(sample).value


def test_tags_must_occur_once_in_order_and_hold_something():
    reward = TagFormat()
    good = "<think>a</think>\n<answer>b</answer>\n"
    bad = [
        "", "b", "<answer>b</answer>", "<think>a</think>", "<answer>b</answer><think>a</think>", good + good,
        "<think>a<answer>b</answer></think>", "<think></think><answer>b</answer>", "<think>a</think><answer> </answer>",
        "so <think>a</think><answer>b</answer>", good + "more", "<think>a</think> then <answer>b</answer>",
        "<think>a<think>b</think></think><answer>c</answer>", "<THINK>a</THINK><answer>b</answer>",
    ]  # fmt: skip

    assert value(reward, good) == 1.0
    assert [value(reward, text) for text in bad] == [0.0] * len(bad)
    assert value(TagFormat(allow_text_around=True), "so <think>a</think> then <answer>b</answer> end") == 1.0
    assert value(TagFormat(is_first_opened=True), "a</think><answer>b</answer>") == 1.0
    assert value(TagFormat(is_first_opened=True), good) == 0.0
    with pytest.raises(ValueError, match=r"tags is \['a b'\]"):
        TagFormat(tags=["a b"])


def test_patterns():
    assert value(PatternMatch(r"\d+"), " 42\n") == 1.0
    assert value(PatternMatch(r"\d+"), "42 x") == 0.0
    assert value(PatternMatch("b.c", where="anywhere"), "ab\ncd") == 1.0
    assert value(PatternMatch("b", where="start"), "ab") == 0.0
    with pytest.raises(ValueError, match="where is 'middle', expected one of: whole, start, anywhere"):
        PatternMatch("x", where="middle")


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"n": 3}', 1.0), ('  {"n": 3}\n', 1.0), ('{"n": "3"}', 0.0), ("{}", 0.0), ('{"n": 3, "m": 1}', 0.0),
        ('{"n": 3} so', 0.0), ("", 0.0), ('{"n": NaN}', 0.0), ('{"n": 1, "n": 2}', 0.0), ("[" * 50_000, 0.0),
        ('{"n": ' + "9" * 5000 + "}", 0.0), ("{'n': 3}", 0.0), ('```json\n{"n": 3}\n```', 0.0),
    ],
    ids=range(13),
)  # fmt: skip
def test_json_must_be_json_and_fit_the_schema(text, expected):
    assert value(JsonSchema(schema=SCHEMA), text) == expected


def test_fenced_json_partial_credit_and_schemas_of_the_row():
    fenced = JsonSchema(schema=SCHEMA, where="fenced", partial=0.25)
    of_row = JsonSchema(schema_column="schema")

    assert value(fenced, 'Here:\n```json\n{"n": 3}\n```\nDone') == 1.0
    assert value(fenced, '```\n{"n": 3}\n```\n```\n{"m": 3}\n```') == 0.25
    assert value(of_row, "3", schema='{"type": "integer"}') == 1.0
    assert value(of_row, "3", schema={"type": "string"}) == 0.0
    with pytest.raises(RewardError, match="column 'schema' holds no JSON schema"):
        value(of_row, "3", schema="{")
    with pytest.raises(ValueError, match="exactly one of schema and schema_column"):
        JsonSchema()
    with pytest.raises(ValueError, match="schema: 'strin' is not valid"):
        JsonSchema(schema={"type": "strin"})


def test_the_soft_overlong_penalty_falls_in_a_line():
    reward = OverlongPenalty(max_length=100, buffer=20)

    lengths = {0: 0.0, 80: 0.0, 85: -0.25, 90: -0.5, 100: -1.0, 101: -1.0, 10_000: -1.0}
    assert {n: value(reward, "", num_tokens=n) for n in lengths} == lengths
    assert value(reward, "", num_tokens=10, is_truncated=True) == -1.0
    assert value(OverlongPenalty(3, unit="words"), "a b c") == 0.0
    assert value(OverlongPenalty(3, unit="words"), "a b c d") == -1.0
    with pytest.raises(RewardError, match="number of tokens is not known"):
        value(reward, "x")
    with pytest.raises(ValueError, match="0 <= buffer <= max_length"):
        OverlongPenalty(10, buffer=11)


def test_repetition_counts_ngrams():
    reward = RepetitionPenalty(ngram_size=2, max_penalty=2.0)

    assert value(reward, "a b c d") == 0.0
    assert value(reward, "a b a b") == pytest.approx(-2.0 * (1 - 2 / 3))
    assert value(reward, "a") == 0.0
    assert value(reward, "a " * 1001) == pytest.approx(-2.0 * 0.999)


def test_the_script_of_the_letters_is_counted_outside_of_code_and_formulas():
    reward = ScriptConsistency("latin")

    assert value(reward, "so x = 3") == 1.0
    assert value(reward, "ab 你好") == 0.5
    assert value(reward, "ab $α + β$ ```\nжжж\n```") == 1.0
    assert value(ScriptConsistency("han"), "你好 ab") == 0.5
    assert value(ScriptConsistency("latin", min_share=0.9), "ab 你好") == 0.0
    with pytest.raises(ValueError, match="script is 'klingon'"):
        ScriptConsistency("klingon")


@pytest.mark.parametrize(
    ("completion", "gold", "expected"),
    [
        (r"\boxed{B}", "B", 1.0), (r"\boxed{(B)}", "(B)", 1.0), (r"\boxed{b}", "B", 1.0),
        (r"\boxed{\text{B}}", "B.", 1.0),
        ("The answer is B.", "B", 1.0), ("The answer is (B) because", "B", 1.0), ("<answer>B</answer>", "1", 1.0),
        (r"\boxed{C}", "B", 0.0), (r"\boxed{A or B}", "B", 0.0), ("B", "B", 0.0), ("", "B", 0.0),
        (r"\boxed{E}", "B", 0.0),
        ("The answer is A, B, C, D", "B", 0.0), (r"\boxed{Because}", "B", 0.0), ("<think>The answer is B", "B", 0.0),
    ],
)  # fmt: skip
def test_a_choice_is_one_letter(completion, gold, expected):
    assert value(MultipleChoice(), completion, answer=gold) == expected


def test_a_gold_that_is_no_choice_is_an_error():
    with pytest.raises(RewardError, match="expected one of ABCD or an index"):
        value(MultipleChoice(), r"\boxed{A}", answer="Q")


def test_texts_match_exactly_or_nearly():
    assert value(TextMatch(), "The  Green-Apple!", answer="green apple") == 0.0  # a hyphen joins words
    assert value(TextMatch(), "The  Green apple!", answer="green apple") == 1.0
    assert value(TextMatch(normalise=False), "Green apple", answer="green apple") == 0.0
    assert value(TextMatch("contains"), "I ate a green apple today", answer="green apple") == 1.0
    assert value(TextMatch("contains"), "greenish apples", answer="green") == 0.0
    assert value(TextMatch("token_f1"), "red apple pie", answer="apple") == pytest.approx(0.5)
    assert value(TextMatch("edit"), "abcd", answer="abcf") == pytest.approx(0.75)
    assert value(TextMatch("edit", min_value=0.8), "abcd", answer="abcf") == 0.0
    assert value(TextMatch(extract=["answer_tag"]), "<answer>x</answer>", answer=["y", "x"]) == 1.0
    with pytest.raises(RewardError, match="holds no text"):
        value(TextMatch(), "x", answer="...")


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {
    "type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}}}]  # fmt: skip


def call(name: str = "add", **arguments) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_tool_calls_name_a_tool_and_fit_its_schema():
    reward = ToolCalls(tools=TOOLS)
    bad = [
        "", "add(1)", call(b=1), call(a="1"), call("sub", a=1), "<tool_call>{</tool_call>", "<tool_call>{}",
        call(a=1) + call("sub", a=1), '<tool_call>["add"]</tool_call>',
    ]  # fmt: skip

    assert value(reward, "I add.\n" + call(a=1)) == 1.0
    assert value(reward, call(a=1) + call(a=2)) == 1.0
    assert [value(reward, text) for text in bad] == [0.0] * len(bad)


def test_wanted_tool_calls_are_compared_in_order():
    reward = ToolCalls(tools_column="tools", wanted_column="calls")
    columns = {"tools": json.dumps(TOOLS), "calls": [{"name": "add", "arguments": {"a": 1}}]}

    assert value(reward, call(a=1), **columns) == 1.0
    assert value(reward, call(a=2), **columns) == 0.0
    assert value(reward, call(a=1) * 2, **columns) == 0.0
    gold = reward.gold_completion(RewardSample(prompt="", completion="", columns=columns))
    assert value(reward, gold, **columns) == 1.0 and reward.needs_right_answer
    assert ToolCalls(tools=TOOLS).needs_right_answer is False
    with pytest.raises(RewardError, match="column 'tools' holds no JSON"):
        value(reward, call(a=1), tools="[", calls=[])


def test_steps_are_scored_alone_or_with_what_came_before():
    inner = {"path": "rlbench_rewards.pattern_match.PatternMatch", "kwargs": {"pattern": "a.*"}}

    assert value(StepwiseReward(**inner, is_cumulative=False, reduce="mean"), "ab\n\nba\n\nac\n\nad") == 0.75
    assert value(StepwiseReward(**inner, is_cumulative=True, reduce="min"), "ab\n\nba") == 1.0
    assert value(StepwiseReward(**inner, is_cumulative=False, reduce="last"), "ab\n\nba") == 0.0
    assert value(StepwiseReward(**inner), "\n\n") == 0.0
    with pytest.raises(ValueError, match="reduce is 'sum'"):
        StepwiseReward(**inner, reduce="sum")


@pytest.mark.parametrize(
    "reward",
    [TagFormat(), TagFormat(is_first_opened=True), OverlongPenalty(9, unit="characters"), RepetitionPenalty(3),
     ScriptConsistency(), MultipleChoice(), MultipleChoice(extract=["hash"]), TextMatch(),
     TextMatch(extract=["boxed"]), JsonSchema(schema={}), JsonSchema(schema_column="schema", where="fenced"),
     ToolCalls(tools=TOOLS), ToolCalls(tools_column="tools", wanted_column="answer")],
    ids=lambda r: type(r).__name__,
)  # fmt: skip
def test_rewards_agree_with_their_own_unit_cases(reward):
    cases = reward.unit_cases()

    assert len(cases) >= 2 or isinstance(reward, OverlongPenalty)
    for case in cases:
        sample = RewardSample(prompt="", completion=case.completion, columns=case.columns, num_tokens=case.num_tokens)
        assert reward(sample).value == pytest.approx(case.expected), case
