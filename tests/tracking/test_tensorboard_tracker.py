import io
import math
import os

import pytest

from rlbench.tracking import tensorboard_tracker
from rlbench.tracking.console import RunConsole
from rlbench.tracking.errors import TrackingError
from rlbench.tracking.jsonl import JsonlWriter, read_metrics
from rlbench.tracking.tensorboard_tracker import TensorboardTracker, check_tensorboard
from rlbench.tracking.tracker import Tracker


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tensorboard_tracker, "find_spec", lambda name: None)

    with pytest.raises(ValueError, match="tracking.tensorboard is true, but .* pip install 'rlbench\\[tensorboard\\]'"):
        check_tensorboard()


def events(folder):
    """(step, key, value) of the files, read by TensorBoard's own loader."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found = []
    for path in sorted(folder.glob("events.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_numbers_become_scalars_at_their_step(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = TensorboardTracker(tmp_path)
    tracker.log(3, {"reward/mean": 0.5, "kl/reference": None, "loss/total": math.nan})
    assert events(tmp_path / "tensorboard") == [(3, "reward/mean", 0.5)]  # before the end: a killed run keeps it
    tracker.log(4, {"eval/accuracy": 0.25})
    tracker.finish()

    assert events(tmp_path / "tensorboard")[1:] == [(4, "eval/accuracy", 0.25)]


def test_a_resumed_run_hides_the_steps_that_it_makes_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorboardTracker(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"reward/mean": float(step)})
    first.finish()
    second = TensorboardTracker(tmp_path, steps_done=2)
    second.log(3, {"reward/mean": 30.0})
    second.finish()

    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("reward/mean")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def fill_the_disk(monkeypatch, of: str = "", after: int = 0) -> None:
    """Of writes to files with `of` in their path, those after the first few bring half of their bytes to the disk, then
    nothing."""
    real_open, real_write, watched = os.open, os.write, {}

    def open_(path, *rest):
        fd = real_open(path, *rest)
        watched.pop(fd, None)
        if of in str(path):
            watched[fd] = after
        return fd

    def write(fd, data):
        if fd in watched:
            watched[fd] -= 1
            if watched[fd] < -1:
                raise OSError(28, "No space left on device")
            if watched[fd] < 0:
                return real_write(fd, data[: len(data) // 2])
        return real_write(fd, data)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "write", write)


def bytes_after_records(data: bytes) -> int:
    """Of a record that is not whole. A whole one is its length in 8 bytes, 4 of a checksum, the event, 4 again."""
    while len(data) >= 8 and len(data) >= (size := 16 + int.from_bytes(data[:8], "little")):
        data = data[size:]
    return len(data)


@pytest.mark.parametrize("num_kept", [0, 2])
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_one_sentence_and_the_run_goes_on(tmp_path, monkeypatch, num_kept, capfd):
    pytest.importorskip("tensorboard")
    fill_the_disk(monkeypatch, of="tfevents", after=num_kept and num_kept + 1)  # the file's opening is a write
    out = io.StringIO()
    console = RunConsole(is_terminal=False, file=out)
    curves = TensorboardTracker(tmp_path)
    tracker = Tracker(JsonlWriter(tmp_path / "metrics.jsonl"), 5, console=console, tensorboard=curves)

    for step in range(1, 6):
        tracker.log_step(step, {"reward/mean": float(step)})
    tracker.close()

    said = out.getvalue()
    assert said.replace("\n", "").count("tensorboard is off") == said.count("warning") == 1
    reason = f"cannot write the curves of step {num_kept + 1} to {curves.path}: No space left on device"
    assert f"tensorboard is off for the rest of this run ({reason})" in said.replace("\n", "")
    assert capfd.readouterr() == ("", "")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    assert [step for step, _, _ in events(tmp_path / "tensorboard")] == list(range(1, num_kept + 1))
    assert bytes_after_records(curves.path.read_bytes()) == 0


def test_a_disk_too_full_for_the_record_stops_the_run_with_tensorboard_too(tmp_path, monkeypatch, capfd):
    pytest.importorskip("tensorboard")
    fill_the_disk(monkeypatch, after=3)
    tracker = Tracker(JsonlWriter(tmp_path / "metrics.jsonl"), 5, tensorboard=TensorboardTracker(tmp_path))

    with pytest.raises(TrackingError, match=r"cannot write the metrics of step 4 to .*metrics\.jsonl: No space left"):
        for step in range(1, 6):
            tracker.log_step(step, {"reward/mean": float(step)})
    tracker.close()

    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3 and "Traceback" not in capfd.readouterr().err


def test_a_folder_that_cannot_be_made_is_said_at_the_first_step(tmp_path):
    (tmp_path / "tensorboard").write_text("")

    with pytest.raises(
        TrackingError, match=r"cannot write the curves of step 1 to .*tfevents.*: (File exists|Not a d)"
    ):
        TensorboardTracker(tmp_path).log(1, {"reward/mean": 0.5})
