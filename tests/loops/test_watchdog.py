"""What counts as progress, and what does not count as time."""

import time
from types import SimpleNamespace

import pytest

from rlbench import progress
from rlbench.config.watchdog import WatchdogConfig
from rlbench.data.packing import pack
from rlbench.engine.hf_engine import HfEngine
from rlbench.loops import watchdog as watchdog_module
from rlbench.loops.stopping import StopRequest
from rlbench.loops.watchdog import Watchdog
from rlbench.records import SamplingParams
from tests.training.test_step import make_policy, make_samples


def watched(folder, limit_s: float) -> tuple[Watchdog, list]:
    """Looks every 20 ms; what it gives up is kept instead of raised."""
    stop, given_up = StopRequest(print, grace_s=0.08), []
    stop.abandon = given_up.append
    watchdog = Watchdog(WatchdogConfig(limit_s=limit_s), stop, folder)
    watchdog.close()  # so that it ends no process
    return watchdog, given_up


def test_a_process_that_was_suspended_is_no_hang(tmp_path, monkeypatch):
    jumps = iter([0.0, 0.0, 10_000.0])
    now = [0.0]

    def monotonic() -> float:
        now[0] += 0.01 + next(jumps, 0.0)
        return now[0]

    watchdog, given_up = watched(tmp_path, limit_s=5)
    monkeypatch.setattr(watchdog_module, "time", SimpleNamespace(monotonic=monotonic))

    with watchdog:
        time.sleep(0.5)

    assert now[0] > 10_000 and not given_up


def test_time_without_progress_is_counted_and_marks_and_phases_reset_it(tmp_path):
    watchdog, given_up = watched(tmp_path, limit_s=0.4)
    with watchdog, watchdog.phase("update"):
        for _ in range(5):
            time.sleep(0.2)
            progress.mark()
        for _ in range(5):
            with watchdog.phase("values"):
                time.sleep(0.2)
        assert not given_up
        time.sleep(1.0)

    (due,) = given_up
    assert str(due).startswith("update: no progress for 0.4 s (watchdog.limit_s); the stacks of all threads are in")
    assert due.exit_status == 9 and "test_time_without_progress" in (tmp_path / "stacks_update.txt").read_text()


def test_0_turns_it_off(tmp_path):
    watchdog, given_up = watched(tmp_path, limit_s=0)
    with watchdog, watchdog.phase("update"):
        time.sleep(0.3)

    assert not given_up and WatchdogConfig(phase_limits_s={"weight_sync": 3}).limit_of("weight sync") == 3


@pytest.mark.parametrize("num_tokens", [4, 9])
def test_every_token_and_every_microbatch_is_progress(tiny_base, num_tokens):
    engine, policy = HfEngine(tiny_base), make_policy(tiny_base)
    before = progress.num_marks()
    engine.generate([[5, 6]] * 3, SamplingParams(max_tokens=num_tokens), range(3))
    assert progress.num_marks() == before + num_tokens

    microbatches = pack(make_samples(), tokens_per_microbatch=40, device="cpu")
    before = progress.num_marks()
    for microbatch in microbatches:
        policy.hidden(microbatch)
    assert progress.num_marks() == before + len(microbatches) > before + 1
