"""What a step and a checkpoint cost after many steps: no more than at the start."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlbench.config.schema import RunConfig
from rlbench.loops import training_loop
from rlbench.loops.evaluate import Evaluation
from rlbench.loops.stopping import StopRequest
from rlbench.loops.training_loop import TrainingLoop
from rlbench.loops.watchdog import Watchdog

PROBLEMS = [f"problem {number}" for number in range(50)]


class EvaluatedLoop(TrainingLoop):
    """Steps of nothing, an evaluation after each."""

    def _begin(self):
        pass

    def _step(self, num_steps):
        self.step += 1

    def _evaluate(self):
        answers = {name: number < self.step for number, name in enumerate(PROBLEMS)}
        metrics = {"eval/accuracy": self.step / len(PROBLEMS)}
        self._log_evaluation(Evaluation(step=self.step, is_correct=answers, metrics=metrics, sampled={"a": 0.5}))

    def _state(self):
        return {}

    def _restore(self, state):
        pass


def make_loop(folder: Path, *, num_steps: int) -> EvaluatedLoop:
    config = RunConfig()
    config.training.num_steps, config.checkpoint.every_steps, config.evaluation.every_steps = num_steps, 1, 1
    policy = SimpleNamespace(weights=lambda: SimpleNamespace(fingerprint=lambda: ""), begin_step=lambda *position: None)
    stop = StopRequest(print, grace_s=1.0)
    return EvaluatedLoop(
        inputs=SimpleNamespace(config=config, model=SimpleNamespace(name="none")),
        parts=SimpleNamespace(policy=policy, optimizer=None),
        tracker=SimpleNamespace(wandb=None, log_evaluation=lambda *given: None),
        console=SimpleNamespace(phase=lambda name: nullcontext(), warning=print, note=print),
        run_folder=folder,
        stop=stop,
        watchdog=Watchdog(config.watchdog, stop, folder),
    )  # type: ignore[arg-type]


@pytest.fixture
def saved(monkeypatch) -> list[dict]:
    """What each checkpoint of a loop would hold."""
    states: list[dict] = []

    def save(folder, policy, optimizer, state, **options):
        states.append(json.loads(json.dumps(state)))
        return folder

    monkeypatch.setattr(training_loop, "save_checkpoint", save)
    monkeypatch.setattr(training_loop, "restore", lambda *given: None)
    return states


def test_checkpoints_keep_the_numbers_of_all_evaluations_and_the_answers_of_two(saved, tmp_path):
    make_loop(tmp_path, num_steps=9).run()
    resumed = make_loop(tmp_path, num_steps=12)
    resumed.resume(SimpleNamespace(state=saved[-1], folder=tmp_path))  # type: ignore[arg-type]
    resumed.run()

    assert [state["step"] for state in saved] == [*range(1, 13)]
    for state in saved:
        evaluations = state["evaluations"]
        assert [e["metrics"]["eval/accuracy"] for e in evaluations] == [s / 50 for s in range(state["step"] + 1)]
        assert [e["step"] for e in evaluations if e["is_correct"] and e["sampled"]] == [0, state["step"]]
        assert sum(evaluations[-1]["is_correct"].values()) == state["step"]
        assert not any(e["is_correct"] or e["sampled"] for e in evaluations[1:-1])


def test_a_step_begins_without_writing_down_what_only_a_checkpoint_needs(saved, tmp_path):
    loop = make_loop(tmp_path, num_steps=3)
    loop.run()

    before = loop._checkpoint_state()  # as of a step that will be given up
    loop._evaluate()
    assert callable(before["evaluations"])
    assert [evaluation["step"] for evaluation in before["evaluations"]()] == [0, 1, 2, 3]
