"""Rows from files: what is loaded, what is refused, with line numbers."""

import json

import pytest

from rlbench.config.schema import DataConfig
from rlbench.data.sources import load_rows


def write_rows(path, lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def row(question="1+1?", answer="2", **more) -> bytes:
    return json.dumps({"question": question, "answer": answer, **more}).encode()


def test_rows_keep_their_line_numbers_and_columns(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [row(), b"", row("2+2?", "4", level=3)])

    loaded = load_rows(DataConfig(path=path), "train")

    assert loaded.dataset["row_number"] == [1, 3]
    assert loaded.dataset["level"] == [None, 3]


BROKEN = {
    "truncated JSON": (b'{"question": "a"', "line 2: not JSON"),
    "not an object": (b"[1, 2]", "line 2: a JSON list, expected an object"),
    "no answer": (b'{"question": "a"}', r"line 2: no column 'answer' \(data.answer_column\)"),
    "misspelt column": (b'{"question": "a", "anwser": "1"}', "did you mean anwser"),
    "empty question": (row("  "), "line 2: column 'question' is '  ', expected text"),
    "null answer": (b'{"question": "a", "answer": null}', "column 'answer' is None"),
    "list answer": (b'{"question": "a", "answer": [1]}', r"column 'answer' is \[1\]"),
    "latin-1": ('{"question": "é", "answer": "1"}'.encode("latin-1"), "line 2: not UTF-8"),
    "NaN": (b'{"question": "a", "answer": NaN}', "line 2: column 'answer' is nan, expected text or a finite number"),
    "too large": (b'{"question": "a", "answer": -1e999}', "line 2: column 'answer' is -inf"),
    "surrogate elsewhere": (row(more="\ud83d"), "line 2: it holds half of a surrogate pair"),
    "lone surrogate": (b'{"question": "\\ud800", "answer": "1"}', "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_an_error_with_its_line_number(tmp_path, name):
    line, message = BROKEN[name]
    path = write_rows(tmp_path / "a.jsonl", [row(), line, row()])

    with pytest.raises(ValueError, match=message):
        load_rows(DataConfig(path=path), "train")


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_skipped_and_listed_up_to_the_limit(tmp_path, name):
    line, message = BROKEN[name]
    path = write_rows(tmp_path / "a.jsonl", [row(), line, row()])

    loaded = load_rows(DataConfig(path=path, max_bad_rows=1), "train")

    assert loaded.dataset["row_number"] == [1, 3]
    assert len(loaded.bad_rows) == 1 and loaded.bad_rows[0].startswith("line 2")


def test_a_missing_or_empty_file_is_named_with_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"data.path is .*nothing.jsonl, but there is no such file"):
        load_rows(DataConfig(path=str(tmp_path / "nothing.jsonl")), "train")
    with pytest.raises(ValueError, match="it holds no row"):
        load_rows(DataConfig(path=write_rows(tmp_path / "empty.jsonl", [])), "train")


def test_a_byte_order_mark_carriage_returns_and_blank_lines_are_no_part_of_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + row() + b"\r\n\r\n" + row("2+2?", "4") + b"\r\n \n\n")

    loaded = load_rows(DataConfig(path=str(tmp_path / "a.jsonl")), "train")

    assert loaded.dataset["answer"] == ["2", "4"] and loaded.dataset["row_number"] == [1, 3]


@pytest.mark.parametrize("answers", [(2, 3.5), (2, "3"), (2, 12345678901234567890123), (True, "x")])
def test_answers_of_several_kinds_are_texts_as_the_file_writes_them(tmp_path, answers):
    path = write_rows(tmp_path / "a.jsonl", [json.dumps({"question": "?", "answer": a}).encode() for a in answers])

    assert load_rows(DataConfig(path=path), "train").dataset["answer"] == [str(answer) for answer in answers]


def test_columns_of_two_types_are_named_with_both_rows(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [row(), row(level=3), row(level="hard")])

    with pytest.raises(ValueError, match="column 'level' is a number in row 2 and text in row 3"):
        load_rows(DataConfig(path=path), "train")


def test_generated_problems_say_that_they_are_not_the_data_set_and_splits_differ():
    train = load_rows(DataConfig(source="generated"), "train")
    test = load_rows(DataConfig(source="generated"), "test")

    assert train.description.startswith("NOT gsm8k")
    assert not set(train.dataset["question"]) & set(test.dataset["question"])
    assert train.dataset["question"][:5] == load_rows(DataConfig(source="generated"), "train").dataset["question"][:5]


def test_hub_only_is_an_error_without_a_hub(monkeypatch):
    monkeypatch.setattr("rlbench.data.sources.hub_problem", lambda: "no network")

    with pytest.raises(ValueError, match=r"data.source is hub, but the hub cannot be reached \(no network\)"):
        load_rows(DataConfig(source="hub"), "train")


NOTES = "<<[^>]*>>"


def test_what_answer_remove_matches_is_left_out_of_answers_alone(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [row("a <<b>> c?", "48/2 = <<48/2=24>>24\n#### 24"), row("1+1?", "2")])

    loaded = load_rows(DataConfig(path=path, answer_remove=NOTES), "train")

    assert loaded.dataset["answer"] == ["48/2 = 24\n#### 24", "2"]
    assert loaded.dataset["question"] == ["a <<b>> c?", "1+1?"]
    assert loaded.dataset["row_number"] == [1, 2]
    assert loaded.description.endswith("2 rows, of which 1 answers less data.answer_remove")


def test_answers_that_are_numbers_pass_answer_remove_unchanged(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [json.dumps({"question": "1+1?", "answer": 2}).encode()])

    assert load_rows(DataConfig(path=path, answer_remove=NOTES), "train").dataset["answer"] == [2]


def test_answer_remove_that_leaves_nothing_is_an_error_with_the_row(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [row("1+1?", "2"), row("1+2?", "<<3>>")])

    with pytest.raises(ValueError, match="leaves nothing of the answer in row 2"):
        load_rows(DataConfig(path=path, answer_remove=NOTES), "train")


def test_answer_remove_must_be_a_regular_expression():
    with pytest.raises(ValueError, match=r"data.answer_remove is '\(', expected a regular expression"):
        DataConfig(answer_remove="(")
