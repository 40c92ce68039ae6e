"""Rows of preferences become the tokens that TRL's own DPOTrainer and KTOTrainer make of them."""

import warnings

import pytest
from transformers import AutoTokenizer

from rlbench.config.schema import DataConfig
from rlbench.data.preferences import make_preferences, preference_problem, split_prompt, wrong_answer
from rlbench.engine.vllm_process import clean_start
from tests.algorithms.test_preference_losses import build

with warnings.catch_warnings(), clean_start():  # TRL imports vLLM where it is installed
    warnings.simplefilter("ignore")
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

USER, OTHER = ({"role": "user", "content": text} for text in ("what is 2+3?", "and 1+1?"))
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("it is 5", "it is 6"))
PAIRS = {
    "explicit texts": {"prompt": "2+3=", "chosen": "5", "rejected": "6"},
    "explicit conversations": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "several turns": {"prompt": [USER, GOOD, OTHER], "chosen": [GOOD], "rejected": [BAD]},
    "implicit texts": {"chosen": "the sum is 5 now", "rejected": "the sum is 6"},
    "implicit conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
}


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


def preferences(rows, tokenizer, config=None, *, is_unpaired=False, limit=200):
    rows = [{**row, "row_number": i} for i, row in enumerate(rows, start=1)]
    options = {"max_tokens": limit, "max_packed_tokens": 2 * limit, "limit_reason": "a test"}
    return make_preferences(rows, "train", config or DataConfig(), tokenizer, is_unpaired=is_unpaired, **options)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_those_of_dpo_trainer(tiny_folder, tokenizer, tmp_path, name):
    theirs = build(DPOTrainer, DPOConfig, tiny_folder, tmp_path, [PAIRS[name]] * 2).train_dataset[0]

    (ours,) = preferences([PAIRS[name]], tokenizer).rows

    assert list(ours.prompt_token_ids) == theirs["prompt_ids"]
    assert [list(ids) for ids in ours.completions] == [theirs["chosen_ids"], theirs["rejected_ids"]]


def test_single_completions_and_their_mismatches_are_those_of_kto_trainer(tiny_folder, tokenizer, tmp_path):
    rows = [{"prompt": p, "completion": c, "label": p > "b"} for p, c in (("ab", "c"), ("bc", "dd"), ("cd", "eee"))]
    theirs = build(KTOTrainer, KTOConfig, tiny_folder, tmp_path, rows).train_dataset

    ours = preferences(rows, tokenizer, is_unpaired=True).rows

    assert [list(row.prompt_token_ids) for row in ours] == list(theirs["prompt_ids"])
    assert [list(row.completions[0]) for row in ours] == list(theirs["completion_ids"])
    assert [row.is_desirable for row in ours] == list(theirs["label"])
    assert all(own.completions[1] == ours[i - 1].completions[0] for i, own in enumerate(ours))


def test_data_of_one_label_alone_says_so(tokenizer):
    def described(*labels):
        rows = [{"prompt": "ab" + "c" * i, "completion": "d", "label": label} for i, label in enumerate(labels)]
        return preferences(rows, tokenizer, is_unpaired=True).format

    assert "all labels are true" in described(True, True) and "all labels are false" in described(False, False)
    assert "all labels" not in described(True, False)


def test_for_an_unpaired_loss_a_pair_is_two_completions(tokenizer):
    rows = preferences([PAIRS["explicit texts"], PAIRS["implicit texts"]], tokenizer, is_unpaired=True).rows

    assert [row.is_desirable for row in rows] == [True, False, True, False]
    assert all(row.prompt_token_ids != rows[i - 2].prompt_token_ids for i, row in enumerate(rows))
    assert rows[0].completions[1] == rows[3].completions[0] and rows[1].completions[1] == rows[3].completions[0]


def test_a_question_is_paired_with_a_wrong_number(tokenizer):
    (row,) = preferences([{"question": "2+3", "answer": "2+3=5"}], tokenizer).rows

    chosen, rejected = (tokenizer.decode(ids) for ids in row.completions)
    assert tokenizer.decode(row.prompt_token_ids) == "<user>2+3\n<assistant>"
    assert chosen == "2+3=5\n<eos>" and rejected.startswith("2+3=") and rejected != chosen
    assert all(int(wrong_answer("5", str(i))) != 5 for i in range(50))


def test_the_prompt_of_an_implicit_row_ends_where_the_completions_part():
    assert split_prompt("a b c", "a b d") == ("a b", " c", " d")
    assert split_prompt([1, 2], [1, 3]) == ([1], [2], [3])
    assert split_prompt("ab", "abc") == ("a", "b", "bc")


def test_rows_that_are_too_long_are_an_error_or_left_out(tokenizer):
    rows = [PAIRS["explicit texts"], {"prompt": "a", "chosen": "b" * 300, "rejected": "c"}]

    with pytest.raises(ValueError, match=r"row 2 of the train data has 302 tokens, expected at most 200 \(a test\)"):
        preferences(rows, tokenizer)
    kept = preferences(rows, tokenizer, DataConfig(long_prompts="skip"))
    assert len(kept.rows) == 1 and kept.num_too_long == 1


def test_mistakes_of_the_data_are_sentences(tokenizer):
    with pytest.raises(ValueError, match="row 1 of the train data has no prompt"):
        preferences([{"chosen": "a", "rejected": "b"}], tokenizer)
    with pytest.raises(ValueError, match="row 1 of the train data has no prompt"):
        preferences([{"chosen": [GOOD], "rejected": [BAD]}], tokenizer)
    with pytest.raises(ValueError, match="no completion of another prompt"):
        preferences([PAIRS["explicit texts"]], tokenizer, is_unpaired=True)
    with pytest.raises(ValueError, match="data.system_prompt is set, but rows with the columns prompt and chosen"):
        preferences([PAIRS["explicit texts"]], tokenizer, DataConfig(system_prompt="be brief"))


PROBLEMS = {
    "no known column": ({"a": 1}, "it has the columns a, expected prompt, chosen and rejected"),
    "equal": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
    "empty": ({"prompt": "a", "chosen": "", "rejected": "b"}, "column 'chosen' is empty"),
    "both kinds": ({"prompt": "a", "chosen": [GOOD], "rejected": [BAD]}, "prompt is text, chosen is a conversation"),
    "a null": ({"prompt": "a", "chosen": None, "rejected": "b"}, "has the columns prompt, chosen (null), rejected"),
    "pairs with their prompt": (
        {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "user", "content": "a"}, GOOD],
         "rejected": [BAD]},
        "column 'chosen' begins with a turn of the user, expected what follows the prompt alone",
    ),
    "a label for a paired loss": (
        {"prompt": "a", "completion": "b", "label": True}, "which kto and apo_zero_unpaired alone can read"
    ),
    "a label that is none": ({"prompt": "a", "completion": "b", "label": "yes"}, "column 'label' is 'yes', expected"),
    "an answer without a number": ({"question": "a", "answer": "b"}, "holds no number that could be wrong"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_wrong_with_a_row(name):
    row, message = PROBLEMS[name]

    assert message in preference_problem(row, DataConfig(), is_unpaired=False)


@pytest.mark.parametrize("name", PAIRS)
def test_rows_in_trls_formats_are_right(name):
    assert preference_problem(PAIRS[name], DataConfig(), is_unpaired=False) == ""
