"""Rows of files: the same rows in every format, and what is wrong with a file in one sentence."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlbench.config.schema import DataConfig
from rlbench.data.row_files import file_rows
from rlbench.data.sources import load_rows

ROWS = [{"question": "1+1, twice?", "answer": "04"}, {"question": 'he said\n"é"', "answer": "4"}]


def written(folder: Path, kind: str) -> Path:
    """The file of `ROWS` in a format; its name says nothing where the content does."""
    path = folder / f"rows.{kind if kind in ('csv', 'tsv') else 'data'}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=1)
    elif kind == "array":
        path.write_text("\n " + json.dumps(ROWS, indent=1))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        cells = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
        quoted = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row] for row in cells]
        between = "," if kind == "csv" else "\t"
        path.write_bytes(b"\xef\xbb\xbf" + "".join(between.join(row) + "\r\n" for row in quoted).encode())
    return path


@pytest.mark.parametrize("kind", ["jsonl", "array", "csv", "tsv", "parquet"])
def test_the_same_rows_come_from_every_format(tmp_path, kind):
    path = written(tmp_path, kind)
    loaded = load_rows(DataConfig(path=str(path), eval_path=str(path)), "train")

    assert [{name: row[name] for name in ("question", "answer")} for row in loaded.dataset] == ROWS
    assert loaded.dataset["row_number"] == [1, 2]
    assert load_rows(DataConfig(path=str(path), eval_path=str(path)), "test").dataset["answer"] == ["04", "4"]


def test_parquet_keeps_numbers_lists_and_conversations(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "level": 3, "tags": []},
        {"messages": [{"role": "user", "content": "c"}], "level": None, "tags": ["x"]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")

    found = list(file_rows(tmp_path / "a.parquet", "data.path"))
    assert [row.values for row in found] == rows
    assert [(row.number, row.place, row.problem) for row in found] == [(1, "row 1", ""), (2, "row 2", "")]


BROKEN_FILES = {
    "an array that is cut": ("a.json", b'[{"question": "a"}, {"que', r"begins as a JSON array and is none \(.* line 1"),
    "an array of texts": ("a.json", b'["a", "b"]', "a JSON array without an object"),
    "an array in Latin-1": ("a.json", '[{"a": "é"}]'.encode("latin-1"), "which is not UTF-8"),
    "an empty array": ("a.json", b"[]", "it holds no row"),
    "a cut Parquet file": ("a.parquet", b"PAR1 and no more", "a Parquet file that cannot be read"),
    "a column twice": ("a.csv", b"question,answer,answer\n1,2,3\n", "names the column 'answer' twice"),
    "a quote that stays open": ("a.csv", b'question,answer\n"1,2\n', "cannot be read as CSV"),
    "CSV in Latin-1": ("a.csv", "question,answer\né,1\n".encode("latin-1"), "which is not UTF-8"),
    "names alone": ("a.tsv", b"question\tanswer\n", "it holds no row"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_file_that_cannot_be_read_is_named_with_its_key(tmp_path, name):
    file, content, message = BROKEN_FILES[name]
    (tmp_path / file).write_bytes(content)

    with pytest.raises(ValueError, match=rf"^data\.path is .*{file}, .*{message}"):
        load_rows(DataConfig(path=str(tmp_path / file), max_bad_rows=9), "train")


BROKEN_ROWS = {
    "an array with a number": (
        "a.json",
        b'[{"question": "a", "answer": "1"}, 3]',
        "row 2: a JSON int, expected an object",
    ),
    "a short row of CSV": ("a.csv", b"question,answer\na,1\n\nb\n", "row 2: 1 fields, but the first line names 2"),
    "an empty answer": ("a.csv", b"question,answer\na,1\nb,\n", "row 2: column 'answer' is '', expected text"),
    "half a character": ("a.json", b'[{"question": "a", "answer": "\\ud83d"}]', "row 1: it holds half of a surrogate"),
}


@pytest.mark.parametrize("name", BROKEN_ROWS)
def test_a_row_that_cannot_be_used_is_named_by_its_place(tmp_path, name):
    file, content, message = BROKEN_ROWS[name]
    (tmp_path / file).write_bytes(content)

    with pytest.raises(ValueError, match=rf"has 1 rows that cannot be used.*{message}"):
        load_rows(DataConfig(path=str(tmp_path / file)), "train")


def test_a_field_of_a_table_may_be_long(tmp_path):
    (tmp_path / "a.csv").write_text(f"question,answer\n{'x' * 300_000},1\n")

    assert len(load_rows(DataConfig(path=str(tmp_path / "a.csv")), "train").dataset["question"][0]) == 300_000
