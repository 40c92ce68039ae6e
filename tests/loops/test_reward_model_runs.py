"""A reward model end to end on the tiny model: it learns a planted preference, resumes, and pays a policy for it."""

import json
import random
import signal

import pytest

from rlbench.tracking.jsonl import read_metrics
from rlbench.training.checkpoint import find_checkpoint
from tests.loops.conftest import run, run_afresh, start
from tests.loops.test_rl_runs import comparable, wait_for
from tests.loops.test_user_errors import check
from tests.tiny import CHARACTERS, save_tiny_model

NUM_STEPS = 40


@pytest.fixture(scope="module")
def overrides(tiny_folder, tmp_path_factory) -> list[str]:
    """The completion with more letters `a` is preferred."""
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    draw = random.Random(0)
    rows = []
    for _ in range(480):  # what a policy may write, repetition included, and the same with more letters `a`
        alphabet = draw.sample(CHARACTERS[:-1], draw.choice([1, 2, 95]))
        few = [draw.choice(alphabet) for _ in range(draw.randint(1, 12))]
        many = ["a" if draw.random() < 0.6 else letter for letter in few[:-1]] + ["a"]
        few = ["b" if letter == "a" else letter for letter in few]
        prompt = f"<user>{draw.randrange(8)}+{draw.randrange(5)}\n<assistant>"
        rows.append({"prompt": prompt, "chosen": "".join(many), "rejected": "".join(few)})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "name=tiny", f"model.path={tiny_folder}", "model.dtype=float32", "hardware.num_threads=1",
        "data=file", f"data.path={file}",
        "reward_model.pairs_per_step=8", "training.tokens_per_microbatch=100", f"training.num_steps={NUM_STEPS}",
        "evaluation.num_prompts=40", "evaluation.every_steps=20", "optim.lr=0.005", "reward_model.centering_coef=0.01",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    done = run_afresh("+exp=reward_model_gsm8k", *overrides, "hydra.run.dir=run", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, folder / "run"


def test_held_out_pairs_of_a_planted_preference_are_told_apart(finished):
    lines = list(read_metrics(finished[1] / "metrics.jsonl", "train"))
    held_out = list(read_metrics(finished[1] / "metrics.jsonl", "eval"))

    assert lines[0]["loss/reward_model"] == pytest.approx(0.6931, abs=1e-4)
    assert lines[0]["training/num_microbatches"] > 1
    assert lines[-1]["loss/reward_model"] < 0.2 and lines[-1]["reward_model/margin"] > 2
    assert held_out[-1]["eval/preference_accuracy"] > 0.95 and held_out[0]["eval/preference_accuracy"] == 0
    for expected in ("reward_model.centering_coef", "told apart", "What was learned", "margin", "adapter"):
        assert expected in finished[0].stdout
    assert (finished[1] / "adapter" / "value_head.safetensors").is_file()


def test_a_killed_run_continues_bit_for_bit(finished, overrides, tmp_path):
    arguments = ["+exp=reward_model_gsm8k", *overrides, "checkpoint.every_steps=2"]
    process = start(*arguments, "hydra.run.dir=run", folder=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert 2 <= find_checkpoint(tmp_path / "run")[0].step < NUM_STEPS

    resumed = run(*arguments, "resume=run", folder=tmp_path)

    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert comparable(tmp_path / "run") == comparable(finished[1])
    head = "adapter/value_head.safetensors"
    assert (tmp_path / "run" / head).read_bytes() == (finished[1] / head).read_bytes()


def paid_by(folder, *more) -> list[str]:
    component = f"{{path:reward_model,kwargs:{{run:{folder}}}}}"
    return ["~rewards.components.share", f"+rewards.components.preference={component}", *more]


def test_a_policy_that_is_paid_by_it_raises_its_score(finished, tiny_overrides, tmp_path):
    done = run(
        *tiny_overrides, *paid_by(finished[1]), "training.num_steps=26", "evaluation.num_prompts=0",
        "hydra.run.dir=run", "optim.schedule=constant", folder=tmp_path,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl", "train"))
    first, last = (sum(line["reward/preference"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert last > first + 0.5
    assert lines[0]["reward/error_frac"] == 0 and lines[0]["time/rewards_s"] > 0

    rescored = run("rescore", "run", folder=tmp_path)
    assert rescored.returncode == 2
    assert "rewards.components.preference is a reward model, but rescore loads no model" in rescored.stderr


def test_the_experiment_runs_with_it_alone_and_resumes_bit_for_bit(finished, tiny_overrides, tmp_path):
    own = [o for o in tiny_overrides if "rewards" not in o]
    arguments = [
        "+exp=grpo_reward_model_gsm8k", *own, f"rewards.components.preference.kwargs.run={finished[1]}",
        "~rewards.components.accuracy", "optim.schedule=constant",
    ]  # fmt: skip
    whole = run(*arguments, "training.num_steps=4", "hydra.run.dir=whole", folder=tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    run(*arguments, "training.num_steps=2", "hydra.run.dir=cut", folder=tmp_path)
    rest = run(*arguments, "training.num_steps=4", "resume=cut", folder=tmp_path)
    assert rest.returncode == 0, rest.stdout + rest.stderr

    ours, theirs = (list(read_metrics(tmp_path / name / "metrics.jsonl", "train"))[-1] for name in ("cut", "whole"))
    for key in ("reward/preference", "loss/total", "optim/grad_norm", "kl/reference"):
        assert ours[key] == theirs[key]


ERRORS = {
    "no run": ({"kwargs": "{}"}, "rewards.components.preference.kwargs.run is None, expected the folder of a run"),
    "no such run": ({"kwargs": "{run:nowhere}"}, "kwargs.run is nowhere, but no value_head.safetensors of a run is"),
    "another key": ({"kwargs": "{path:x}"}, "there is no key 'rewards.components.preference.kwargs.path'"),
    "a batch size": ({"kwargs": "{run:nowhere}", "batch_size": "4"}, "preference.batch_size is 4, but a reward model"),
    "another scale": (
        {"kwargs": "{run:nowhere,normalise:running}"}, "kwargs.normalise is 'running', expected one of: none, held_out"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_a_mistake_is_one_sentence(name, tiny_overrides, tmp_path):
    options, message = ERRORS[name]
    component = ",".join(f"{key}:{value}" for key, value in {"path": "reward_model", **options}.items())

    done = run(*tiny_overrides, f"+rewards.components.preference={{{component}}}", folder=tmp_path)

    check(done, message)


def test_another_base_is_named(finished, tiny_overrides, tmp_path):
    other = save_tiny_model(tmp_path / "other", seed=1)
    overrides = [o for o in tiny_overrides if not o.startswith("model.path")]

    done = run(*overrides, f"model.path={other}", *paid_by(finished[1]), folder=tmp_path)

    check(done, f"model.path is {other}, but the reward model of rewards.components.preference.kwargs.run was trained")


def test_a_bad_margin_is_named(overrides, tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "large"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")

    done = run("+exp=reward_model_gsm8k", *overrides, "data.path=bad.jsonl", folder=tmp_path)

    check(done, "column 'margin' is 'large', expected a number")
