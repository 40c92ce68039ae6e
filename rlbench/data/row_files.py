"""Rows of a user's file: JSONL, one JSON array, CSV, TSV or Parquet, told by how it begins and by its ending."""

from __future__ import annotations

import csv
import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMATS = "JSONL (one JSON object a line), one JSON array, CSV, TSV or Parquet"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_NUM_FIRST_BYTES = 4096  # that tell a file's format
_LONGEST_FIELD = 2**31 - 1  # of CSV, characters


@dataclass(frozen=True, slots=True)
class FileRow:
    """One row, or what is wrong with it."""

    number: int  # its line of JSONL, else its place among the rows, from 1
    place: str  # in words, with the number
    values: dict[str, Any]
    problem: str = ""


def file_rows(path: Path, key: str) -> Iterator[FileRow]:
    """All rows in their order; empty lines are none.

    Args:
        path: of the file.
        key: the setting that names it.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(_NUM_FIRST_BYTES)
    if start.startswith(b"PAR1"):
        return _of_parquet(path, key)
    if path.suffix.lower() in _DELIMITERS:
        return _of_csv(path, key, _DELIMITERS[path.suffix.lower()])
    if start.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
        return _of_array(path, key)
    return _of_lines(path)


def _of_lines(path: Path) -> Iterator[FileRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(BOM_UTF8) if number == 1 else line
            if line.strip():
                yield FileRow(number, f"line {number}", *_parsed(line))


def _of_array(path: Path, key: str) -> Iterator[FileRow]:
    try:
        values = json.loads(path.read_bytes().removeprefix(BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{key} is {path}, which is not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{key} is {path}, which begins as a JSON array and is none ({error.msg} at line {error.lineno}, column "
            f"{error.colno}); expected {FORMATS}"
        ) from error
    if values and not any(isinstance(value, dict) for value in values):
        raise ValueError(f"{key} is {path}, a JSON array without an object; expected {FORMATS}")
    for number, value in enumerate(values, start=1):
        yield FileRow(number, f"row {number}", *_object(value))


def _of_csv(path: Path, key: str, delimiter: str) -> Iterator[FileRow]:
    """All values are texts: a number may have leading zeros that count."""
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            names = next(reader, [])
            twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
            if twice is not None:
                raise ValueError(f"{key} is {path}, whose first line names the column {twice!r} twice")
            for number, values in enumerate((row for row in reader if row), start=1):
                wrong = f"{len(values)} fields, but the first line names {len(names)}"
                yield FileRow(
                    number,
                    f"row {number}",
                    dict(zip(names, values, strict=False)),
                    wrong if len(values) != len(names) else "",
                )
    except UnicodeDecodeError as error:
        raise ValueError(f"{key} is {path}, which is not UTF-8 ({error.reason} at byte {error.start})") from error
    except csv.Error as error:
        raise ValueError(f"{key} is {path}, which cannot be read as {path.suffix[1:].upper()} ({error})") from error


def _of_parquet(path: Path, key: str) -> Iterator[FileRow]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(path).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield FileRow(number, f"row {number}", values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{key} is {path}, a Parquet file that cannot be read ({error})") from error


def _parsed(line: bytes) -> tuple[dict[str, Any], str]:
    """The object and what is wrong with the line ("" if nothing is)."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8 ({error.reason} at byte {error.start})"
    except json.JSONDecodeError as error:
        return {}, f"not JSON ({error.msg} at column {error.colno})"
    return _object(row, may_hold_surrogates=b"\\ud" in line.lower())


def _object(value: Any, *, may_hold_surrogates: bool = True) -> tuple[dict[str, Any], str]:
    if not isinstance(value, dict):
        return {}, f"a JSON {type(value).__name__}, expected an object"
    if may_hold_surrogates:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return {}, "it holds half of a surrogate pair, expected whole characters"
    return value, ""
