"""wandb never asks, never blocks, never stops a run."""

import subprocess
import sys
import threading
import time

import pytest

from rlbench.tracking.wandb_tracker import WandbTracker, find_api_key

pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def make(tmp_path, mode="auto", **options):
    warnings: list[str] = []
    tracker = WandbTracker(mode, "proj", "run", tmp_path, {"optim": {"lr": 1e-5}}, warn=warnings.append, **options)
    return tracker, warnings


OFFLINE_RUN = """
import sys
from rlbench.tracking.wandb_tracker import WandbTracker
tracker = WandbTracker("auto", "proj", "run", sys.argv[1], {"a": {"b": float("nan")}}, run_id="abcd1234", tags=["t"])
tracker.log(1, {"reward/mean": 0.5, "loss/policy": float("nan")})
tracker.log(1, {"eval/accuracy": 0.5})
tracker.finish()
print(tracker.mode, tracker.run_id)
"""


def test_offline_mode_writes_files_under_the_run_and_prints_nothing(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", OFFLINE_RUN, str(tmp_path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert process.stdout == "offline abcd1234\n"
    assert process.stderr == ""
    (file,) = tmp_path.glob("wandb/offline-run-*-abcd1234/run-abcd1234.wandb")
    content = file.read_bytes()
    assert b"reward/mean" in content and b"eval/accuracy" in content


def test_an_init_that_hangs_is_given_up_at_the_deadline(tmp_path, monkeypatch):
    import wandb

    release = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: release.wait(20))
    start = time.monotonic()
    tracker, warnings = make(tmp_path, init_deadline_s=0.3)
    assert time.monotonic() - start < 10  # init would hold it for 20 s
    tracker.log(1, {"reward/mean": 1.0})
    tracker.finish()
    release.set()
    assert not tracker.is_on and len(warnings) == 1
    assert "did not start within 0.3 s" in warnings[0] and "metrics.jsonl" in warnings[0]


@pytest.mark.parametrize("error", [RuntimeError("no\nserver"), SystemExit(1), KeyboardInterrupt()])
def test_an_init_that_raises_turns_it_off_with_one_line(tmp_path, monkeypatch, error):
    import wandb

    def fail(**_):
        raise error

    monkeypatch.setattr(wandb, "init", fail)
    tracker, warnings = make(tmp_path)
    tracker.log(1, {})
    tracker.finish()
    assert len(warnings) == 1 and "\n" not in warnings[0] and type(error).__name__ in warnings[0]


class FakeRun:
    def __init__(self, on_log=lambda: None, on_finish=lambda: None):
        self.logged, self.axes, self.is_finished = [], [], False
        self._on_log, self._on_finish = on_log, on_finish

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, metrics):
        self._on_log()
        self.logged.append(metrics)

    def finish(self):
        self._on_finish()
        self.is_finished = True


def test_step_is_the_axis_and_everything_queued_is_logged_before_finish(tmp_path, monkeypatch):
    import wandb

    run, options = FakeRun(), {}
    monkeypatch.setattr(wandb, "init", lambda **kwargs: options.update(kwargs) or run)
    tracker, warnings = make(tmp_path, run_id="abcd1234", tags=["x"])
    for step in range(50):
        tracker.log(step, {"reward/mean": float(step)})
    tracker.finish()
    assert [m["step"] for m in run.logged] == list(range(50)) and run.is_finished and warnings == []
    assert ("*", "step") in run.axes
    assert (options["id"], options["mode"], options["tags"]) == ("abcd1234", "offline", ["x"])
    assert options["config"] == {"optim": {"lr": 1e-5}}


def test_a_log_that_raises_turns_it_off_and_one_that_hangs_does_not_block(tmp_path, monkeypatch):
    import wandb

    def fail():
        raise BrokenPipeError("service gone")

    monkeypatch.setattr(wandb, "init", lambda **_: FakeRun(on_log=fail))
    tracker, warnings = make(tmp_path)
    tracker.log(1, {})
    tracker.finish()
    assert "service gone" in warnings[0] and len(warnings) == 1

    release = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: FakeRun(on_log=lambda: release.wait(20)))
    tracker, warnings = make(tmp_path)
    start = time.monotonic()
    for step in range(100):
        tracker.log(step, {})
    tracker.finish(deadline_s=0.3)
    assert time.monotonic() - start < 10  # a log would hold it for 20 s
    release.set()
    assert len(warnings) == 1 and "did not finish within 0.3 s" in warnings[0]


def test_auto_goes_online_only_with_a_key_and_online_without_one_says_that_it_is_offline(tmp_path, monkeypatch):
    import wandb

    options = {}
    monkeypatch.setattr(wandb, "init", lambda **kwargs: options.update(kwargs) or FakeRun())
    tracker, warnings = make(tmp_path, mode="online")
    assert tracker.mode == options["mode"] == "offline" and "no API key" in warnings[0]

    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    tracker, warnings = make(tmp_path)
    assert tracker.mode == options["mode"] == "online" and options["resume"] == "allow" and warnings == []
    assert options["settings"].api_key == "k" * 40

    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker, warnings = make(tmp_path)
    assert tracker.mode == "disabled" and tracker.run_id is None
    tracker.log(1, {})
    tracker.finish()


def test_keys_are_found_in_netrc_for_the_servers_host_only(tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password abc\nmachine own.example:8080 login user password xyz\n")
    env = {"NETRC": str(netrc)}
    assert find_api_key(env) == "abc"
    assert find_api_key(env | {"WANDB_BASE_URL": "http://own.example:8080"}) == "xyz"
    assert find_api_key(env | {"WANDB_BASE_URL": "https://other.example"}) is None
    assert find_api_key(env | {"WANDB_API_KEY": "direct"}) == "direct"
    netrc.write_bytes(b"\xff machine")
    assert find_api_key(env) is None


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got 'onlin'"):
        make(tmp_path, mode="onlin")


def test_importing_it_imports_neither_wandb_nor_torch_nor_pyarrow():
    code = (
        "import sys, rlbench.tracking.tracker, rlbench.tracking.rollout_store\n"
        "print([m for m in ('wandb', 'torch', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
