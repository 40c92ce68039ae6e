"""scripts/smoke_stages.py: stages in their own processes, one after the one that it needs, a table, and a status."""

import json
import subprocess
import sys

from tests.loops.conftest import ENVIRONMENT, ROOT


def smoke(folder, *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
    command = [sys.executable, str(ROOT / "scripts" / "smoke_stages.py"), "--folder", str(folder), "--parallel", "2"]
    done = subprocess.run([*command, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=250)
    return done, json.loads((folder / "smoke.json").read_text())


def test_a_stage_starts_from_the_one_that_it_comes_after(tmp_path):
    done, result = smoke(tmp_path, "--stages", "sft,distillation", "--steps", "2")
    rows = {row["stage"]: row for row in result["rows"]}

    assert done.returncode == 0, done.stdout + done.stderr
    assert list(rows) == ["sft", "distillation"] and all(row["status"] == "0" for row in rows.values())
    assert f"algorithm.teacher.adapter={tmp_path / 'sft' / 'run'}" in rows["distillation"]["command"]
    assert all(row["num_steps"] == row["num_updates"] == 2 and row["peak_mib"] > 0 for row in rows.values())
    assert rows["sft"]["last_loss"] < rows["sft"]["first_loss"] and rows["sft"]["first_reward"] is None
    assert rows["distillation"]["first_reward"] > 0
    assert result["environment"]["packages"]["torch"]
    assert "distillation  0" in done.stdout


def test_a_stage_that_fails_is_told_and_what_needs_it_is_not_started(tmp_path):
    done, result = smoke(tmp_path, "--stages", "sft,distillation", "optim.lrr=1")

    assert done.returncode == 1
    assert [row["status"] for row in result["rows"]] == ["2", "needs sft"]
    assert "there is no key 'optim.lrr'" in done.stdout


def test_a_stage_past_its_time_is_ended(tmp_path):
    done, result = smoke(tmp_path, "--stages", "sft", "--limit-s", "1")

    assert done.returncode == 1 and result["rows"][0]["status"] == "time limit"
    assert result["rows"][0]["seconds"] < 5
