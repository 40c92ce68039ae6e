"""A file or folder is the old or the new one at every moment."""

import os
from pathlib import Path

import pytest

from rlbench.tracking.whole_file import replace_folder, write_whole


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


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    new, target, done = tmp_path / ".new", tmp_path / "result", []
    for folder, text in ((new, "new"), (target, "old")):
        (folder / "inside").mkdir(parents=True)
        (folder / "inside" / "weights").write_text(text)
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    monkeypatch.setattr(os, "rename", lambda old, name: (done.append(f"{Path(name).name}"), rename(old, name)))

    replace_folder(new, target)

    assert done.index(".result.before") < done.index("result")  # what was there is never half removed under its name
    named = done.index("result")
    assert {str(new / "inside" / "weights"), str(new / "inside"), str(new)} <= set(done[:named])
    assert done[named + 1 :] == [str(tmp_path)] and (target / "inside" / "weights").read_text() == "new"
    assert [folder.name for folder in tmp_path.iterdir()] == ["result"]
