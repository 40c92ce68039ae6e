"""Rollouts come back from parquet as they were written."""

import math
import os
from dataclasses import replace

import pytest

from rlbench.records import RewardComponent
from rlbench.tracking.errors import TrackingError
from rlbench.tracking.rollout_store import (
    cut_rollouts,
    read_groups,
    read_rollout_table,
    read_rollouts,
    rollouts_path,
    write_rollouts,
)

pyarrow = pytest.importorskip("pyarrow")


def test_rollouts_round_trip(tmp_path, rollout, group):
    components = {
        "accuracy": RewardComponent(status="value", value=1.0, weight=1.0, details={"answer": "4"}),
        "judge": RewardComponent(status="timeout", value=None, weight=0.5, message="no verdict within 5 s"),
    }
    first = rollout(0, components=components, reward=None, columns={"answer": "4", "n": [1, 2]})
    second = rollout(1, components={"accuracy": components["accuracy"]}, reward=1.0)

    path = write_rollouts(tmp_path, 12, [group(first, second)], {second.rollout_id: 0.7})
    rows = read_rollouts(path)

    assert path == tmp_path / "rollouts" / "step-000012.parquet"
    assert rows[0] == {
        "rollout_id": "12/train/7/0",
        "step": 12,
        "prompt_id": "train/7",
        "sample_index": 0,
        "prompt_text": "What is 2 + 2? four",
        "completion_text": "four",
        "prompt_token_ids": [5, 6],
        "token_ids": [0, 1],
        "sampling_logprobs": [-0.5, -0.5],
        "finish_reason": "stop",
        "seed": 2**63 - 1,
        "policy_version": 3,
        "adapter_fingerprint": "9f2c",
        "reward": None,
        "advantage": None,
        "replay_age": None,
        "columns": {"answer": "4", "n": [1, 2]},
        "component_accuracy": 1.0,
        "component_accuracy_status": "value",
        "component_accuracy_message": "",
        "component_accuracy_details": {"answer": "4"},
        "component_judge": None,
        "component_judge_status": "timeout",
        "component_judge_message": "no verdict within 5 s",
        "component_judge_details": {},
    }
    assert (rows[1]["reward"], rows[1]["advantage"]) == (1.0, 0.7)
    assert rows[1]["component_judge_status"] is None and rows[1]["component_judge_details"] is None


def test_replayed_rollouts_have_a_file_of_their_own_and_their_age(tmp_path, rollout, group):
    old = replace(rollout(), replay_age=4)

    path = write_rollouts(tmp_path, 12, [group(old)], {}, phase="replayed")

    assert path == rollouts_path(tmp_path, 12, "replayed") == tmp_path / "rollouts" / "replayed-step-000012.parquet"
    assert read_groups(path)[0].rollouts[0].replay_age == read_rollouts(path)[0]["replay_age"] == 4
    assert not list((tmp_path / "rollouts").glob("step-*"))


def test_columns_have_the_promised_types(tmp_path, rollout, group):
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(write_rollouts(tmp_path, 1, [group(rollout())], {}))
    assert schema.field("token_ids").type == pyarrow.list_(pyarrow.int32())
    assert schema.field("sampling_logprobs").type == pyarrow.list_(pyarrow.float32())
    assert schema.field("seed").type == pyarrow.int64()
    assert schema.field("component_accuracy").type == pyarrow.float64()


def test_hostile_text_and_details_do_not_crash_it(tmp_path, rollout, group, hostile):
    class Rude:
        def __repr__(self):
            raise RuntimeError("no")

    cycle: dict = {"x": math.nan, "rude": Rude(), "set": {1}, 3: b"\xff"}
    cycle["self"] = cycle
    components = {"odd name": RewardComponent(status="error", value=None, weight=1, message=hostile, details=cycle)}
    path = write_rollouts(
        tmp_path, 1, [group(rollout(text=hostile, components=components, columns={"question": hostile}))], {}
    )

    (row,) = read_rollouts(path)

    assert row["completion_text"] == hostile.replace("\ud800", "\\ud800")
    assert row["columns"]["question"] == hostile
    details = row["component_odd name_details"]
    assert details["x"] == "nan" and details["set"] == [1] and details["3"] == "b'\\xff'"
    assert "Rude" in details["rude"]


def test_evaluations_and_empty_steps_have_files_of_their_own(tmp_path):
    path = write_rollouts(tmp_path, 0, [], {}, phase="eval")
    assert path.name == "eval-step-000000.parquet"
    assert read_rollouts(path) == []
    with pytest.raises(ValueError, match="phase must be one of"):
        rollouts_path(tmp_path, 0, "test")


def test_names_whose_columns_clash_are_refused(tmp_path, rollout, group):
    one = RewardComponent(status="value", value=1.0, weight=1.0)
    with pytest.raises(ValueError, match="clashing"):
        write_rollouts(tmp_path, 1, [group(rollout(components={"a": one, "a_status": one}))], {})


def test_a_failed_write_leaves_no_file_and_the_old_one_whole(tmp_path, rollout, group, monkeypatch):
    path = write_rollouts(tmp_path, 1, [group(rollout())], {})

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrackingError, match="rollouts of step 1 to .*: No space left on device"):
        write_rollouts(tmp_path, 1, [], {})
    assert os.listdir(path.parent) == [path.name]
    assert len(read_rollouts(path)) == 1


def test_a_file_that_is_not_whole_is_one_clear_error(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(TrackingError, match="not a whole parquet file"):
        read_rollouts(tmp_path / "x.parquet")
    with pytest.raises(TrackingError, match="cannot read the rollouts"):
        read_rollouts(tmp_path / "none.parquet")


def test_a_file_without_a_column_that_is_read_is_one_sentence(tmp_path, rollout, group):
    path = write_rollouts(tmp_path, 3, [group(rollout())], {})

    assert set(read_rollout_table(path, ["reward", "token_ids"]).column_names) == {"token_ids", "reward"}
    with pytest.raises(TrackingError, match=r"^cannot read the rollouts in .*: they have no column seeds$") as caught:
        read_rollout_table(path, ["step", "seeds"])
    assert "\n" not in str(caught.value)


def test_files_of_steps_that_a_run_makes_again_are_cut(tmp_path):
    for phase in ("train", "eval", "replayed"):
        for step in (0, 2, 3):
            write_rollouts(tmp_path, step, [], {}, phase=phase)

    cut_rollouts(tmp_path, step=2, evaluated_to=0)

    kept = [(phase, step) for phase in ("train", "eval", "replayed") for step in (0, 2, 3)
            if rollouts_path(tmp_path, step, phase).exists()]  # fmt: skip
    assert kept == [("train", 0), ("train", 2), ("eval", 0), ("replayed", 0), ("replayed", 2)]
