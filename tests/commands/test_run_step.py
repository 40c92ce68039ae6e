"""Which checkpoint a step of a run means: newest, best as the run chose it, damaged ones passed over, every mistake."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlbench.commands.run_step import checkpoint_folders, find_step, why_incomparable
from rlbench.config.schema import CheckpointConfig, EvaluationConfig, RunConfig
from rlbench.loops.evaluate import Evaluation
from rlbench.loops.training_loop import TrainingLoop
from rlbench.training.checkpoint import _write_manifest


def keeping(key: str | None) -> RunConfig:
    return RunConfig(checkpoint=CheckpointConfig(keep_best=key), evaluation=EvaluationConfig(every_steps=1))


def write_checkpoints(folder: Path, values: dict[int, float], kept: list[int], key: str = "eval/accuracy") -> Path:
    """Checkpoints without tensors, of a run with these evaluations by step."""
    for step in kept:
        place = folder / "checkpoints" / f"step-{step:06d}"
        place.mkdir(parents=True)
        before = [{"step": s, "metrics": {key: value}} for s, value in values.items() if s <= step]
        (place / "state.json").write_text(json.dumps({"step": step, "evaluations": before}))
        _write_manifest(place)
    return folder


def damage(folder: Path, step: int) -> None:
    (folder / "checkpoints" / f"step-{step:06d}" / "state.json").write_text("{}")


def step_of(folder: Path, name: str, key: str | None = "eval/accuracy") -> int:
    found = find_step(folder, name, keeping(key))
    assert found.checkpoint is not None
    return found.checkpoint.step


def refused(folder: Path, name: str, sentence: str, key: str | None = "eval/accuracy", **options) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        find_step(folder, name, keeping(key), **options)
    assert "\n" not in str(caught.value)


def test_last_is_the_newest_by_number_and_only_checkpoints_count(tmp_path):
    write_checkpoints(tmp_path, {}, [999_999, 1_000_000])
    for name in ("step-abc", ".step-2000000.7", "step-²"):
        (tmp_path / "checkpoints" / name).mkdir()

    assert list(checkpoint_folders(tmp_path)) == [999_999, 1_000_000]
    assert step_of(tmp_path, "last") == 1_000_000 and step_of(tmp_path, "999999") == 999_999
    assert step_of(tmp_path, "0999999") == 999_999


def test_the_best_step_is_the_one_that_the_training_loop_chose(tmp_path):
    draw = random.Random(0)
    for number, key in enumerate(["eval/accuracy", "eval/loss"] * 8):
        values = {step: draw.choice([0.1, 0.2, 0.3, 0.4]) for step in range(6)}  # equal ones among them
        folder = write_checkpoints(tmp_path / str(number), values, list(range(6)), key)
        evaluations = [Evaluation(step=s, is_correct={}, metrics={key: v}) for s, v in values.items()]
        loop = SimpleNamespace(inputs=SimpleNamespace(config=keeping(key)), evaluations=evaluations)

        assert step_of(folder, "best", key) == TrainingLoop.best_step.__get__(loop)


def test_the_best_is_by_hand_the_first_of_equals_and_the_lowest_loss(tmp_path):
    accuracy = write_checkpoints(tmp_path / "a", {0: 0.1, 1: 0.5, 2: 0.5, 3: 0.2}, [1, 2, 3])
    loss = write_checkpoints(tmp_path / "b", {0: 3.0, 1: 2.0, 2: 1.0, 3: 1.0}, [1, 2, 3], "eval/loss")

    assert step_of(accuracy, "best") == 1
    assert step_of(loss, "best", "eval/loss") == 2


def test_a_best_step_that_cannot_be_had_is_one_sentence(tmp_path):
    gone = write_checkpoints(tmp_path / "gone", {0: 0.1, 1: 0.5, 3: 0.2}, [2, 3])
    early = write_checkpoints(tmp_path / "early", {0: 0.9, 3: 0.2}, [3])
    none = write_checkpoints(tmp_path / "none", {}, [3])

    kept = (
        r"kept in .*gone; expected one of: 2, 3, last, best \(checkpoint.every_steps and checkpoint.keep_last decide\)$"
    )
    refused(gone, "best", f"^--step is best, which is step 1, of which no checkpoint was {kept}")
    sentence = r"^--step is best, but the best eval/accuracy was that before the first step \(0.9\); expected "
    refused(early, "best", f"{sentence}a step or last$")
    refused(early, "best", f"{sentence}a step, last or base$", may_be_base=True)
    refused(
        gone, "best", "checkpoint.keep_best is null, .* or a run with checkpoint.keep_best as one of: eval/acc", None
    )
    refused(gone, "best", "no evaluation has checkpoint.keep_best=eval/no, expected one of: eval/accuracy;", "eval/no")
    refused(none, "best", "expected one of: none, the run made no evaluation; or a step or last$")


def test_the_start_is_the_best_where_its_checkpoint_is_there(tmp_path):
    assert step_of(write_checkpoints(tmp_path, {0: 0.9, 3: 0.2}, [0, 3]), "best") == 0


def test_a_damaged_newer_checkpoint_is_passed_over_and_told(tmp_path):
    write_checkpoints(tmp_path, {1: 0.5, 2: 0.2, 3: 0.9}, [1, 2, 3])
    damage(tmp_path, 3)

    for name, step in (("last", 2), ("best", 1)):  # as of step 2, the first one was the best
        found = find_step(tmp_path, name, keeping("eval/accuracy"))
        assert found.label == f"step {step}" and len(found.passed_over) == 1
        assert "step-000003 is damaged: state.json" in found.passed_over[0]
        assert found.passed_over[0].endswith("; an older checkpoint is taken")
    assert find_step(tmp_path, "2", RunConfig()).passed_over == ()
    refused(tmp_path, "3", "step-000003 is damaged: state.json")


def test_every_damaged_checkpoint_is_named_where_none_is_left(tmp_path):
    write_checkpoints(tmp_path, {}, [1, 2])
    for step in (1, 2):
        damage(tmp_path, step)
    both = "has no valid checkpoint: .*step-000002 is damaged.*step-000001 is damaged.*; expected a run that saved one"

    refused(tmp_path, "last", both)
    refused(tmp_path, "best", both)


@pytest.mark.parametrize("name", ["last", "best", "3", "x"])
def test_a_run_without_checkpoints_says_when_one_is_saved(tmp_path, name):
    sentence = "has no valid checkpoint; expected a run that saved one: at its end, when it was stopped, or every "

    refused(tmp_path, name, f"{sentence}checkpoint.every_steps$")
    refused(tmp_path, name, f"{sentence}checkpoint.every_steps, or /step base$", said_by="/step", may_be_base=True)


def test_the_base_is_a_name_where_it_is_allowed(tmp_path):
    found = find_step(tmp_path, "base", RunConfig(), may_be_base=True)
    write_checkpoints(tmp_path, {}, [2, 4])

    assert found.checkpoint is None and found.label == "base"
    refused(tmp_path, "base", "^--step is base, expected one of: 2, 4, last, best$")
    refused(tmp_path, "", "^--compare is nothing, expected one of: 2, 4, last, best, base$", said_by="--compare",
            may_be_base=True)  # fmt: skip


def test_all_weights_of_another_dtype_and_what_an_older_rlbench_recorded_cannot_be_compared():
    config = RunConfig()
    config.training.parameters, config.model.dtype = "full", "bfloat16"

    def reason(dtype: str, fingerprint: str = 20 * "a") -> str:
        state = {"config": {"model": {"dtype": dtype}}, "adapter_fingerprint": fingerprint}
        return why_incomparable(SimpleNamespace(state=state), config)

    assert reason("bfloat16") == ""
    assert reason("float32") == "the weights were float32 then and are bfloat16 now"
    assert reason("bfloat16", 16 * "a") == "an older rlbench took it, of the bytes"
