"""What a run says about the machine it ran on."""

import json
import platform
import subprocess
import sys

import rlbench
from rlbench.tracking.environment import command_line, environment, git_revision


def test_the_environment_names_what_is_installed_and_nothing_else():
    found = environment()

    assert found["python"] == platform.python_version() and found["packages"]["pyarrow"]
    assert all(found["packages"].values()) and json.loads(json.dumps(found)) == found


def test_the_command_can_be_copied_into_a_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "+exp=x", "data.prompt_template=a {prompt}"])

    assert command_line() == "python -m rlbench +exp=x 'data.prompt_template=a {prompt}'"
    assert environment()["command"] == command_line()


def test_the_revision_is_the_checkouts_and_says_what_is_changed(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.hooksPath=/dev/null"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    assert git_revision(tmp_path) == ""
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD").stdout.strip()

    assert len(git_revision(tmp_path)) == 12 and head.startswith(git_revision(tmp_path))
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path) == f"{head[:12]}-dirty"
    assert rlbench.__version__ == environment()["rlbench"]
