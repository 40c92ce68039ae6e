import math

import pytest

from rlbench.tracking import tensorboard_tracker
from rlbench.tracking.tensorboard_tracker import TensorboardTracker, check_tensorboard


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
