"""A conversation that the assistant begins: its role header is context, as that of every later turn."""

from importlib.resources import files

import pytest
from transformers import AutoTokenizer

from rlbench.data.conversation import assistant_mask
from tests.data.test_supervised import samples

HELLO, USER, REPLY = (
    {"role": role, "content": text}
    for role, text in (("assistant", "All well?"), ("user", "what is 2+3?"), ("assistant", "it is 5"))
)
QWEN_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
CHATML_ASKED = "<|im_start|>user\nwhat is 2+3?<|im_end|>\n<|im_start|>assistant\n"
LLAMA_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
# Template of TRL's folder: what is context and what is trained on, in turns.
TURNS = {
    "qwen2_5": [
        QWEN_SYSTEM + "<|im_start|>assistant\n", "All well?<|im_end|>\n", CHATML_ASKED, "it is 5<|im_end|>\n",
    ],
    "qwen3": [
        "<|im_start|>assistant\n", "All well?<|im_end|>\n", CHATML_ASKED,
        "<think>\n\n</think>\n\nit is 5<|im_end|>\n",
    ],
    "llama3": [
        "<s>" + LLAMA_HEADER.format("assistant"), "All well?<|eot_id|>",
        LLAMA_HEADER.format("user") + "what is 2+3?<|eot_id|>" + LLAMA_HEADER.format("assistant"), "it is 5<|eot_id|>",
    ],
}  # fmt: skip


def tokenizer_with(tiny_folder, template):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, bos_token="<s>")
    tokenizer.chat_template = files("trl").joinpath(f"chat_templates/{template}.jinja").read_text()
    return tokenizer


@pytest.mark.parametrize("name", TURNS)
def test_headers_are_context_and_answers_are_trained_on(tiny_folder, name):
    tokenizer = tokenizer_with(tiny_folder, name)

    ids, mask = assistant_mask([HELLO, USER, REPLY], {}, tokenizer)

    expected = [
        (token, number % 2 == 1)
        for number, text in enumerate(TURNS[name])
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    assert list(zip(ids, mask, strict=True)) == expected


@pytest.mark.parametrize(("name", "end_of_header"), [("llama3", ""), ("qwen2_5", "\n")])
def test_trained_tokens_are_those_of_trl(tiny_folder, name, end_of_header):
    """TRL's template for Qwen 2.5 trains on the line end of each header too, which no policy writes."""
    theirs = tokenizer_with(tiny_folder, f"{name}_training").apply_chat_template(
        [HELLO, USER, REPLY], return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer = tokenizer_with(tiny_folder, name)

    ids, mask = assistant_mask([HELLO, USER, REPLY], {}, tokenizer)

    assert ids == theirs["input_ids"]
    more = [token for token, own, their in zip(ids, mask, theirs["assistant_masks"], strict=True) if own != bool(their)]
    assert tokenizer.decode(more) == 2 * end_of_header
    assert sum(theirs["assistant_masks"]) == sum(mask) + len(more)


@pytest.mark.parametrize("name", ["gemma", "gemma3"])
def test_a_template_that_refuses_it_is_named_with_the_row(tiny_folder, name):
    with pytest.raises(ValueError, match=r"row 1 of the train data: the chat template refuses the conversation \(Conv"):
        samples([{"messages": [HELLO, USER, REPLY]}], tokenizer_with(tiny_folder, name))


def test_a_template_without_headers_has_nothing_to_leave_out(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"

    ids, mask = assistant_mask([HELLO, USER], {}, tokenizer)

    assert tokenizer.decode([t for t, is_trained in zip(ids, mask, strict=True) if is_trained]) == "All well?\n"
