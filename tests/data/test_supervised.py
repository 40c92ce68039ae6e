"""Rows become the tokens that TRL's own SFTTrainer makes of them; what is wrong with a row is said in a sentence."""

import warnings

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlbench.config.schema import DataConfig, ExampleConfig
from rlbench.data.supervised import make_samples, supervised_format, supervised_problem
from rlbench.engine.vllm_process import clean_start

with warnings.catch_warnings(), clean_start():  # TRL imports vLLM where it is installed
    warnings.simplefilter("ignore")
    from trl import SFTConfig, SFTTrainer

USER, OTHER = ({"role": "user", "content": text} for text in ("what is 2+3?", "and 1+1?"))
REPLY, SECOND = ({"role": "assistant", "content": text} for text in ("it is 5", "2"))
ROWS = {
    "texts": {"prompt": "2+3=", "completion": "5"},
    "conversations": {"prompt": [USER], "completion": [REPLY]},
    "several turns before": {"prompt": [USER, REPLY, OTHER], "completion": [SECOND]},
    "text": {"text": "two and three is five"},
    "text with its end": {"text": "five<eos>"},
    "messages": {"messages": [USER, REPLY, OTHER, SECOND]},
}


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


def samples(rows, tokenizer, loss_on="completion", config=None, max_tokens=200):
    rows = [{**row, "row_number": i} for i, row in enumerate(rows, start=1)]
    return make_samples(
        rows, "train", config or DataConfig(), tokenizer, loss_on=loss_on, max_tokens=max_tokens, limit_reason="a test"
    )


@pytest.mark.parametrize("name", ROWS)
def test_tokens_and_trained_tokens_are_those_of_trl(tiny_folder, tokenizer, tmp_path, name):
    row = ROWS[name]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_folder),
        args=SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, disable_tqdm=True),
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    theirs = trainer.train_dataset[0]

    # TRL trains on the whole of conversations unless it is told otherwise.
    (ours,) = samples([row], tokenizer, loss_on="all" if name == "messages" else "completion").samples

    assert [*ours.prompt_token_ids, *ours.token_ids] == theirs["input_ids"]
    mask = [label != -100 for label in theirs["labels"]]
    start = len(ours.prompt_token_ids)
    assert list(ours.loss_mask) == mask[start:]
    assert not any(mask[1:start])  # the first token has nothing to be predicted from


def test_of_a_conversation_the_assistants_turns_are_trained_on(tokenizer):
    (sample,) = samples([ROWS["messages"]], tokenizer).samples

    trained = [token for token, is_trained in zip(sample.token_ids, sample.loss_mask, strict=True) if is_trained]

    assert tokenizer.decode(sample.prompt_token_ids) == "<user>what is 2+3?\n<assistant>"
    assert tokenizer.decode(trained) == "it is 5\n2\n"


def test_older_names_of_messages_are_read(tokenizer):
    names = {"role": "from", "content": "value"}
    older = {"conversations": [{names[key]: text for key, text in m.items()} for m in (USER, REPLY)]}

    assert samples([older], tokenizer).samples == samples([{"messages": [USER, REPLY]}], tokenizer).samples


def test_a_question_is_shown_as_in_the_online_loop_and_the_answer_ends_as_a_sampled_one(tokenizer):
    config = DataConfig(system_prompt="add", examples=[ExampleConfig(prompt="1+1", answer="2")])

    (sample,) = samples([{"question": "2+3", "answer": 5}], tokenizer, config=config).samples

    assert tokenizer.decode(sample.prompt_token_ids) == "<system>add\n<user>1+1\n<assistant>2\n<user>2+3\n<assistant>"
    assert tokenizer.decode(sample.token_ids) == "5\n<eos>"
    assert all(sample.loss_mask)


def test_loss_on_all_trains_on_the_prompt_too(tokenizer):
    (sample,) = samples([ROWS["texts"]], tokenizer, loss_on="all").samples

    assert len(sample.prompt_token_ids) == 1 and all(sample.loss_mask)
    assert tokenizer.decode([*sample.prompt_token_ids, *sample.token_ids]) == "2+3=5<eos>"


def test_rows_that_are_too_long_are_an_error_or_left_out(tokenizer):
    rows = [ROWS["texts"], {"text": "x" * 300}]

    with pytest.raises(ValueError, match=r"row 2 of the train data has 301 tokens, expected at most 200 \(a test\)"):
        samples(rows, tokenizer)
    kept = samples(rows, tokenizer, config=DataConfig(long_prompts="skip"))
    assert len(kept.samples) == 1 and kept.num_too_long == 1


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] if loop.last else m['content'][:2] }}{% endfor %}"

    with pytest.raises(ValueError, match="row 1 of the train data: the chat template writes turn 2 otherwise when"):
        samples([ROWS["messages"]], tokenizer)
    assert samples([ROWS["messages"]], tokenizer, loss_on="all").samples


def test_conversations_without_a_chat_template_are_refused(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = None

    with pytest.raises(ValueError, match="row 1 of the train data: the model's tokenizer has no chat template"):
        samples([ROWS["messages"]], tokenizer)


def test_a_conversation_without_an_assistant(tokenizer):
    with pytest.raises(ValueError, match="row 1 of the train data has nothing to train on"):
        samples([{"messages": [USER]}], tokenizer)


def test_a_system_prompt_beside_whole_prompts_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="data.system_prompt is set, but rows with the columns messages hold whole"):
        samples([ROWS["messages"]], tokenizer, config=DataConfig(system_prompt="be brief"))


PROBLEMS = {
    "no known column": ({"a": 1}, "it has the columns a, expected prompt and completion, messages, text, or question"),
    "an empty answer": ({"question": "2", "answer": " "}, "column 'answer' is ' ', expected text"),
    "an empty completion": ({"prompt": "a", "completion": ""}, "column 'completion' is empty"),
    "a number": ({"prompt": 3, "completion": "b"}, "column 'prompt' is 3, expected text or a list of messages"),
    "no messages": ({"messages": "hello"}, "column 'messages' is no list of messages"),
    "a message without content": ({"messages": [{"role": "user"}]}, "expected a role and a content that is text"),
    "a null": ({"prompt": "a", "completion": None}, "it has the columns prompt, completion (null), expected"),
    "another's role": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "column 'conversations' has the role 'human', expected one of: system, developer, user, assistant, tool",
    ),
    "a turn without a role": (
        {"messages": [{"role": "user", "content": "a"}, {"role": None, "content": "b"}]}, "has the role None"
    ),
    "a completion with its prompt": (
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", "content": "a"}, REPLY]},
        "column 'completion' begins with a turn of the user, expected what follows the prompt alone",
    ),
    "both kinds": (
        {"prompt": "a", "completion": [REPLY]}, "prompt is text, completion is a conversation; expected one kind"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_wrong_with_a_row(name):
    row, message = PROBLEMS[name]

    assert message in supervised_problem(row, DataConfig())


@pytest.mark.parametrize("name", ROWS)
def test_rows_in_trls_formats_are_right(name):
    assert supervised_problem(ROWS[name], DataConfig()) == ""


@pytest.mark.parametrize(
    ("columns", "expected"),
    [(("text", "code"), ("text", "code")), (("question", "answer"), ("text",)), (("text", "missing"), ("text",))],
)
def test_columns_that_were_named_are_read_before_those_of_trl(columns, expected):
    row = {"text": "write f", "code": "def f(): pass", "question": "q", "answer": "a"}  # as in MBPP
    config = DataConfig(prompt_column=columns[0], answer_column=columns[1])

    assert supervised_format(row, config) == expected
