"""On-policy distillation: the student comes near its teacher, an adapter on the same base or another model."""

import pytest
from tokenizers import Tokenizer

from rlbench.tracking.jsonl import read_metrics
from rlbench.training.checkpoint import find_checkpoint
from tests.loops.conftest import run
from tests.loops.test_algorithm_families import finish, short, start  # noqa: F401 (short is a fixture)
from tests.loops.test_user_errors import check
from tests.tiny import save_tiny_model

STUDENT = ["algorithm=distillation", "optim.lr=0.005", "optim.schedule=constant", "algorithm.prompts_per_step=8"]


@pytest.fixture
def taught(short, tmp_path):  # noqa: F811
    """A teacher that was paid for the letter `a`, and its last rewards."""
    history = finish(start(short, tmp_path / "teacher", "training.num_steps=20"))
    return find_checkpoint(tmp_path / "teacher")[0].folder, history[-1]["reward/mean"]


def test_the_student_comes_near_an_adapter_on_the_same_base(taught, short, tmp_path):  # noqa: F811
    folder, reward = taught
    options = [f"algorithm.teacher.adapter={folder}", "training.num_steps=40"]
    history = finish(start(short, tmp_path / "run", *STUDENT, *options))
    gaps = [line["kl/teacher"] for line in history]

    assert reward > 0.5 and history[0]["reward/mean"] < 0.1  # rewards are watched, not read
    assert sum(gaps[-3:]) / 3 < 0.25 * gaps[0], gaps
    assert history[-1]["reward/mean"] > 0.7 * reward
    assert history[0]["time/teacher_s"] > 0 and history[-1]["policy_version"] == 40


def test_the_student_comes_near_another_model_and_resumes_bit_for_bit(short, tmp_path):  # noqa: F811
    other = save_tiny_model(tmp_path / "other", num_layers=1, seed=1)
    options = [*STUDENT, f"algorithm.teacher.model={other}", "algorithm.teacher.gamma=0.5", "optim.lr=0.02"]
    whole = finish(start(short, tmp_path / "whole", *options, "training.num_steps=20"))
    finish(start(short, tmp_path / "cut", *options, "training.num_steps=18"))
    second = start(short, tmp_path / "cut", *options, "training.num_steps=20", resume_from_step=18)
    second.resume(find_checkpoint(tmp_path / "cut")[0])
    gaps = [line["kl/teacher"] for line in whole]

    assert sum(gaps[-3:]) / 3 < 0.7 * sum(gaps[:3]) / 3, gaps
    for ours, theirs in zip(finish(second), whole[18:], strict=True):
        for key in ("kl/teacher", "loss/total", "optim/grad_norm", "reward/mean"):
            assert ours[key] == theirs[key]


def test_a_student_with_a_start_of_its_own_returns_to_the_base(taught, short, tmp_path):  # noqa: F811
    options = [f"lora.init_from={taught[0]}", "training.num_steps=12"]
    gaps = [line["kl/teacher"] for line in finish(start(short, tmp_path / "run", *STUDENT, *options))]

    assert gaps[0] > 1 and gaps[-1] < 0.5 * gaps[0], gaps


def test_the_experiment_runs(tiny_overrides, tmp_path):
    other = save_tiny_model(tmp_path / "other", seed=1)
    arguments = ["+exp=distillation_gsm8k", *tiny_overrides, "training.num_steps=2", "hydra.run.dir=run"]
    done = run(*arguments, f"algorithm.teacher.model={other}", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "algorithm.teacher" in done.stdout and str(other) in done.stdout
    assert all("kl/teacher" in line for line in read_metrics(tmp_path / "run" / "metrics.jsonl", "train"))
    rescored = run("rescore", "run", folder=tmp_path)
    assert rescored.returncode == 0 and "advantages are its teacher's" in rescored.stdout


ERRORS = {
    "no teacher": ([], "algorithm.teacher.model and algorithm.teacher.adapter are null, so the base teaches"),
    "no such adapter": (
        ["algorithm.teacher.adapter=nowhere"], "algorithm.teacher.adapter is nowhere, but no adapter_model.safetensors"
    ),
    "a teacher that is not read": (
        ["algorithm=grpo", "algorithm.teacher.gamma=1"],
        "algorithm.teacher.gamma is 1.0, but algorithm.advantage=group_relative has no teacher",
    ),
    "rewards that are drawn for": (
        ["algorithm.max_refills=2"], "algorithm.max_refills is 2, but algorithm.advantage=teacher does not read rewards"
    ),
    "a discount": (["algorithm.teacher.gamma=2"], "algorithm.teacher.gamma is 2.0, expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_a_mistake_is_one_sentence(name, tiny_overrides, tmp_path):
    options, message = ERRORS[name]

    check(run("+exp=distillation_gsm8k", *tiny_overrides, *options, folder=tmp_path), message)


def test_a_teacher_with_other_tokens_is_named(tiny_overrides, tmp_path):
    other = save_tiny_model(tmp_path / "other", seed=1)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"Q":', '"QQ":', 1))
    assert "QQ" in Tokenizer.from_file(str(file)).get_vocab()

    done = run("+exp=distillation_gsm8k", *tiny_overrides, f"algorithm.teacher.model={other}", folder=tmp_path)

    check(done, f"algorithm.teacher.model is {other}, whose tokenizer has other tokens than")
