"""Whole runs with truncated sampling and algorithm.support=sampler."""

import shutil

import pytest

from rlbench.tracking.jsonl import read_metrics
from rlbench.training.checkpoint import read_checkpoint
from tests.loops.conftest import run

NUM_STEPS = 4
SETTINGS = [
    f"training.num_steps={NUM_STEPS}",
    "checkpoint.every_steps=1",
    f"checkpoint.keep_last={NUM_STEPS}",
    "algorithm.num_updates=2",
    "algorithm.importance=truncate",
    "hydra.run.dir=run",
]


def trained(overrides, folder, *options):
    done = run(*overrides, *SETTINGS, *options, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def adapter(run_folder) -> str:
    return read_checkpoint(run_folder / "checkpoints" / f"step-{NUM_STEPS:06d}").state["adapter_fingerprint"]


@pytest.fixture(scope="module")
def truncated(tiny_overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("truncated")
    return trained(tiny_overrides, folder, "algorithm.support=sampler", "sampling.top_p=0.7")


def test_engine_and_trainer_agree_on_the_logprobs_that_were_drawn_with(truncated):
    lines = [line for line in read_metrics(truncated / "metrics.jsonl", "train") if "drift/logprob_gap_max" in line]

    assert len(lines) > 1
    for line in lines:
        assert line["drift/logprob_gap_mean"] < 1e-3 and line["importance/weight_mean"] == pytest.approx(1, abs=1e-2)
        assert 0 < line["support/outside_mass_mean"] <= 0.3


def test_a_resumed_run_ends_with_the_same_adapter(truncated, tiny_overrides, tmp_path):
    shutil.copytree(truncated, tmp_path / "run")
    for step in range(3, NUM_STEPS + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")

    options = ["algorithm.support=sampler", "sampling.top_p=0.7", "resume=run"]
    again = trained(tiny_overrides, tmp_path, *options)

    assert adapter(again) == adapter(truncated)


def test_rollouts_of_truncated_sampling_are_replayed_and_scored_again(truncated):
    for command, found in (
        (["replay", "run", "--count", "8"], "8 of 8 rollouts are identical"),
        (["rescore", "run"], ""),
    ):
        done = run(*command, folder=truncated.parent)

        assert done.returncode == 0 and found in done.stdout, done.stdout + done.stderr


def test_the_support_matters_under_truncation_alone(truncated, tiny_overrides, tmp_path):
    of_full = trained(tiny_overrides, tmp_path, "sampling.top_p=0.7")
    assert adapter(of_full) != adapter(truncated)

    plain = []
    for support in ("full", "sampler"):
        (tmp_path / support).mkdir()
        plain.append(adapter(trained(tiny_overrides, tmp_path / support, f"algorithm.support={support}")))
    assert plain[0] == plain[1]
