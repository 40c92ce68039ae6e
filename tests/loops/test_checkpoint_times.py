"""When checkpoints are written: at the user's steps, or so that they take 2% of the time."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlbench.config.schema import RunConfig
from rlbench.loops import training_loop
from rlbench.loops.stopping import StopRequest
from rlbench.loops.training_loop import TrainingLoop
from rlbench.loops.watchdog import Watchdog


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


class CountingLoop(TrainingLoop):
    """Steps that only take time."""

    def _begin(self):
        pass

    def _step(self, num_steps):
        self.step += 1
        CLOCK.now += self.parts.step_s

    def _evaluate(self):
        pass

    def _state(self):
        return {}


CLOCK = Clock()


def saved_steps(monkeypatch, *, num_steps: int, step_s: float, save_s: float, every_steps: int | None) -> list[int]:
    config = RunConfig()
    config.training.num_steps, config.checkpoint.every_steps = num_steps, every_steps
    policy = SimpleNamespace(weights=lambda: SimpleNamespace(fingerprint=lambda: ""), begin_step=lambda *position: None)
    stop = StopRequest(print, grace_s=1.0)
    loop = CountingLoop(
        inputs=SimpleNamespace(config=config, model=SimpleNamespace(name="none")),
        parts=SimpleNamespace(policy=policy, optimizer=None, step_s=step_s),
        tracker=SimpleNamespace(wandb=None),
        console=SimpleNamespace(phase=lambda name: nullcontext(), warning=print),
        run_folder=Path("run"),
        stop=stop,
        watchdog=Watchdog(config.watchdog, stop, Path("run")),
    )  # type: ignore[arg-type]
    steps: list[int] = []

    def save(folder, policy, optimizer, state, **options):
        steps.append(state["step"])
        CLOCK.now += save_s
        return folder

    monkeypatch.setattr(training_loop, "save_checkpoint", save)
    monkeypatch.setattr(training_loop, "time", CLOCK)
    loop.run()
    return steps


@pytest.mark.parametrize(("every", "expected"), [(3, [3, 6, 7]), (0, [7]), (1, [1, 2, 3, 4, 5, 6, 7])])
def test_the_users_steps_are_exact(monkeypatch, every, expected):
    assert saved_steps(monkeypatch, num_steps=7, step_s=0.001, save_s=10, every_steps=every) == expected


def test_slow_steps_are_saved_every_ten(monkeypatch):
    found = saved_steps(monkeypatch, num_steps=35, step_s=60, save_s=1, every_steps=None)

    assert found == [10, 20, 30, 35]


def test_checkpoints_of_fast_steps_take_two_percent_of_the_time(monkeypatch):
    found = saved_steps(monkeypatch, num_steps=1000, step_s=0.25, save_s=0.5, every_steps=None)

    assert found == [10, *range(110, 1000, 100), 1000]  # 0.5 s after 25 s
