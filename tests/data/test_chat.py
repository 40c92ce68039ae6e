"""Prompts that are tokenised together have the tokens of prompts tokenised one by one."""

import pytest

from rlbench.config.schema import DataConfig
from rlbench.data.chat import render, render_all
from rlbench.data.prompts import _TOGETHER, make_prompts
from tests.engine.factories import character_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(params=[TEMPLATE, None], ids=["template", "no template"])
def tokenizer(request):
    tokenizer = character_tokenizer(200)
    tokenizer.chat_template = request.param
    return tokenizer


def conversations(number):
    return [[{"role": "user", "content": "ab" * (i % 7) + str(i)}] for i in range(number)]


def test_all_at_once_is_one_by_one(tokenizer):
    found = render_all(conversations(20), tokenizer)
    assert found == [render(messages, tokenizer) for messages in conversations(20)]
    for text, ids in found:  # nothing is filled up to the longest
        assert list(ids) == tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"]


def test_every_row_of_several_calls_keeps_its_prompt(tokenizer):
    rows = [{"question": f"q{i}", "answer": str(i), "row_number": i + 1} for i in range(2 * _TOGETHER + 3)]
    config = DataConfig(prompt_template="{prompt}", system_prompt=None)
    prompts = make_prompts(rows, "train", config, tokenizer, max_prompt_tokens=100, limit_reason="").prompts

    assert [prompt.prompt_id for prompt in prompts] == [f"train/{i + 1}" for i in range(len(rows))]
    for i, prompt in enumerate(prompts):
        alone = render([{"role": "user", "content": f"q{i}"}], tokenizer)
        assert (prompt.text, prompt.token_ids) == alone and prompt.columns["answer"] == str(i)
