"""A small file is the old or the new one at every moment."""

import os

import pytest

from rlbench.tracking.whole_file import write_whole


def test_a_file_is_replaced_at_once_and_nothing_stays_beside_it(tmp_path, monkeypatch):
    path, seen = tmp_path / "config.yaml", []
    write_whole(path, "old")
    rename = os.replace

    def watched(source, target):
        seen.append((path.read_text(), os.path.getsize(source)))
        rename(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_whole(path, "newer")

    assert seen == [("old", 5)] and path.read_text() == "newer" and os.listdir(tmp_path) == ["config.yaml"]


def test_a_write_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "config.yaml"
    write_whole(path, "old")

    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"
