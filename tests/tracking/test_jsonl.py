"""metrics.jsonl survives nan, crashes, resumes and full disks."""

import json
import math
import os

import pytest

from rlbench.tracking.errors import TrackingError
from rlbench.tracking.jsonl import JsonlWriter, read_metrics


def write_steps(path, steps):
    writer = JsonlWriter(path)
    for step in steps:
        writer.write(step, {"reward/mean": step / 10})
    writer.close()


def test_a_line_is_on_the_disk_when_write_returns(tmp_path):
    writer = JsonlWriter(tmp_path / "run" / "metrics.jsonl")
    writer.write(1, {"reward/mean": 0.5, "note": "\ud800"})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "phase": "train", "reward/mean": 0.5, "note": "\ud800"}
    assert text.endswith("\n")


def test_numbers_that_json_lacks_become_null_and_are_named(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"loss/policy": math.nan, "kl/reference": -math.inf, "reward/mean": 1})
    (line,) = read_metrics(tmp_path / "m.jsonl")
    assert line["loss/policy"] is None and line["kl/reference"] is None
    assert line["non_finite"] == ["loss/policy", "kl/reference"]


def test_array_scalars_are_numbers_and_other_values_are_refused_by_key(tmp_path):
    numpy = pytest.importorskip("numpy")
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"a": numpy.float32(0.5), "b": numpy.int64(3)})
    assert read_metrics(tmp_path / "m.jsonl")[0] == {"step": 1, "phase": "train", "a": 0.5, "b": 3}
    with pytest.raises(ValueError, match="metric 'c' must be a number.*got list"):
        writer.write(2, {"c": [1]})
    with pytest.raises(ValueError, match="'step' is reserved"):
        writer.write(2, {"step": 1})


def test_resume_cuts_later_steps_and_the_damaged_last_line(tmp_path):
    path = tmp_path / "m.jsonl"
    write_steps(path, [1, 2, 3, 4])
    with path.open("ab") as file:
        file.write(b'{"step": 5, "phase": "tra')

    writer = JsonlWriter(path, resume_from_step=2)
    assert (writer.num_cut_lines, writer.num_damaged_lines) == (2, 1)
    writer.write(3, {"reward/mean": 9})

    assert [(line["step"], line["reward/mean"]) for line in read_metrics(path)] == [(1, 0.1), (2, 0.2), (3, 9)]
    assert len(path.read_bytes().splitlines()) == 3
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_resume_goes_on_after_a_whole_line_without_newline(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1, "phase": "train"}')
    writer = JsonlWriter(path, resume_from_step=1)
    writer.write(2, {})
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert writer.num_cut_lines == writer.num_damaged_lines == 0


def test_resume_without_a_file_starts_one(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl", resume_from_step=7)
    writer.write(8, {})
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == [8]


def test_a_new_run_never_overwrites_an_old_one(tmp_path):
    write_steps(tmp_path / "m.jsonl", [1])
    with pytest.raises(TrackingError, match="earlier run"):
        JsonlWriter(tmp_path / "m.jsonl")
    assert len(read_metrics(tmp_path / "m.jsonl")) == 1


def test_a_full_disk_says_what_and_where_and_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, {"reward/mean": 1})
    real_write, calls = os.write, []

    def write_half(fd, data):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real_write(fd, data[:5])

    monkeypatch.setattr(os, "write", write_half)
    with pytest.raises(TrackingError, match=r"metrics of step 2 to .*m\.jsonl: No space left on device"):
        writer.write(2, {"reward/mean": 1})
    monkeypatch.undo()
    writer.write(3, {})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def test_an_unusable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match=r"cannot open .*m\.jsonl"):
        JsonlWriter(tmp_path / "file" / "m.jsonl")


def test_phases_are_told_apart(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(0, {"eval/accuracy": 0.2}, phase="eval")
    writer.write(1, {"reward/mean": 0.2})
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl", phase="eval")] == [0]


def test_an_evaluation_after_the_step_that_a_run_goes_on_from_is_cut_too(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path)
    for step, phase in ((0, "eval"), (1, "train"), (2, "train"), (2, "eval")):
        writer.write(step, {}, phase)
    writer.close()

    JsonlWriter(path, resume_from_step=2, evaluated_to=0).close()
    assert [(line["step"], line["phase"]) for line in read_metrics(path)] == [(0, "eval"), (1, "train"), (2, "train")]

    JsonlWriter(path, resume_from_step=-1).close()
    assert path.read_bytes() == b""
