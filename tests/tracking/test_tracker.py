"""The record on disk must work; every other sink may fail."""

import io

import pytest

from rlbench.tracking.console import RunConsole
from rlbench.tracking.errors import TrackingError
from rlbench.tracking.jsonl import JsonlWriter, read_metrics
from rlbench.tracking.tracker import Tracker


class Sink:
    def __init__(self, fails=False):
        self.fails, self.calls = fails, []

    def log(self, step, metrics):
        self.calls.append((step, dict(metrics)))
        if self.fails:
            raise RuntimeError("wandb broke")

    def finish(self):
        self.calls.append("finish")


def make(tmp_path, wandb):
    console = RunConsole(is_terminal=False, file=io.StringIO())
    return Tracker(JsonlWriter(tmp_path / "metrics.jsonl"), 10, wandb=wandb, console=console), console


def printed(console):
    return console._console.file._file.getvalue()


def test_a_step_reaches_every_sink_and_an_evaluation_the_files(tmp_path):
    wandb = Sink()
    tracker, console = make(tmp_path, wandb)
    tracker.log_evaluation(0, {"eval/accuracy": 0.25})
    tracker.log_step(1, {"reward/mean": 0.5})
    tracker.close()
    assert [(line["step"], line["phase"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [
        (0, "eval"),
        (1, "train"),
    ]
    assert wandb.calls == [(0, {"eval/accuracy": 0.25}), (1, {"reward/mean": 0.5}), "finish"]
    assert printed(console).splitlines()[-1].split()[:2] == ["1/10", "0.500"]


def test_a_failing_optional_sink_is_turned_off_with_one_line(tmp_path):
    wandb = Sink(fails=True)
    tracker, console = make(tmp_path, wandb)
    tracker.log_step(1, {})
    tracker.log_step(2, {})
    tracker.close()
    assert len(wandb.calls) == 1
    assert printed(console).count("wandb is off for the rest of this run (RuntimeError: wandb broke)") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_a_failing_console_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    tracker, console = make(tmp_path, None)

    def fail(*_):
        raise RuntimeError("console broke")

    monkeypatch.setattr(console, "step_line", fail)
    tracker.log_step(1, {})
    tracker.log_step(2, {})
    assert capsys.readouterr().err.count("console is off") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_a_failing_record_stops_the_run(tmp_path):
    tracker, _ = make(tmp_path, None)
    tracker.jsonl.close()
    with pytest.raises(TrackingError, match="metrics of step 1"):
        tracker.log_step(1, {})
