"""Replay of successes end to end on the tiny model: what is replayed is off-policy everywhere, and nowhere fresh."""

import math

import pytest
import torch

from rlbench.tracking.rollout_store import read_rollouts, rollouts_path
from rlbench.training.checkpoint import find_checkpoint, read_checkpoint
from tests.loops.conftest import run
from tests.loops.test_algorithm_families import finish, short, start  # noqa: F401 (short is a fixture)
from tests.loops.test_rl_runs import comparable, sampled
from tests.loops.test_user_errors import check

NUM_STEPS = 8
RARE = [  # about half of the untrained model's groups hold no right answer
    "~rewards.components.share",
    "~rewards.components.accuracy",
    "+rewards.components.accuracy={path:tests.loops.letter_reward.at_all}",
    "data.limit=4",  # each step draws the same prompts
    "evaluation.num_prompts=0",
    "optim.schedule=constant",
    "optim.lr=0.005",
    "algorithm.group_size=4",
]
REPLAY = [*RARE, "algorithm.replay.is_on=true"]


@pytest.fixture(scope="module")
def finished(tiny_overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    steps = [f"training.num_steps={NUM_STEPS}", "checkpoint.every_steps=1", f"checkpoint.keep_last={NUM_STEPS}"]
    done = run(*tiny_overrides, *REPLAY, *steps, "hydra.run.dir=run", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def rows_of(run_folder, phase) -> list[list[dict]]:
    return [read_rollouts(rollouts_path(run_folder, step, phase)) for step in range(1, NUM_STEPS + 1)]


def test_what_is_replayed_is_recorded_beside_the_fresh_and_names_its_own_policy(finished):
    fresh, replayed = rows_of(finished, "train"), rows_of(finished, "replayed")
    known = {row["rollout_id"]: row for rows in fresh for row in rows}
    found = [(step, row) for step, rows in enumerate(replayed, 1) for row in rows]

    assert len(found) >= 3
    assert all(len(rows) == 16 and len({row["policy_version"] for row in rows}) == 1 for rows in fresh)
    for step, row in found:
        original = known[row["rollout_id"]]
        for name in ("token_ids", "sampling_logprobs", "seed", "policy_version", "adapter_fingerprint", "prompt_id"):
            assert row[name] == original[name]
        assert row["replay_age"] == fresh[step - 1][0]["policy_version"] - row["policy_version"] > 0
        assert row["component_accuracy"] == row["reward"] == 1.0 and row["advantage"] > 0
        group = [r for r in fresh[step - 1] if r["prompt_id"] == row["prompt_id"]]
        assert not any(r["reward"] for r in group)
        assert [r["advantage"] for r in group][-1] is None and all(r["advantage"] < 0 for r in group[:-1])
    assert all(row["replay_age"] is None for rows in fresh for row in rows)


def test_metrics_count_fresh_rollouts_and_the_age_of_replayed_ones(finished):
    lines = comparable(finished)
    fresh, replayed = rows_of(finished, "train"), rows_of(finished, "replayed")
    lines = [line for line in lines if line.get("phase", "train") == "train"]

    for line, rows, old in zip(lines, fresh, replayed, strict=True):
        assert line["reward/mean"] == pytest.approx(math.fsum(r["reward"] for r in rows) / len(rows))
        assert line["replay/num_rollouts"] == len(old)
        if old:
            assert line["replay/age_mean"] == pytest.approx(sum(r["replay_age"] for r in old) / len(old))
            assert line["replay/logprob_gap_mean"] > 0.01 > 1000 * line.get("drift/logprob_gap_mean", 0)
        assert line.get("drift/level", 0) == 0


def test_the_loss_sees_the_ratio_to_the_policy_that_sampled(finished, tiny_overrides):
    """The first replayed completion: the trainer's logprobs before that step's update, from its checkpoint."""
    from rlbench.build import build, prepare
    from rlbench.checks.trainer_logprobs import pack_sequences, trainer_logprobs
    from rlbench.config.recorded import recorded_config
    from rlbench.training.checkpoint import restore

    replayed = rows_of(finished, "replayed")
    step = next(step for step, rows in enumerate(replayed, 1) if rows)
    (line,) = [found for found in comparable(finished) if found["step"] == step]
    inputs = prepare(recorded_config(finished))
    parts = build(inputs)
    try:
        restore(read_checkpoint(finished / "checkpoints" / f"step-{step - 1:06d}"), parts.policy, parts.optimizer)
        tokens = [tuple(row["token_ids"]) for row in replayed[step - 1]]
        prompts = [tuple(row["prompt_token_ids"]) for row in replayed[step - 1]]
        (trained,) = trainer_logprobs(parts.policy, pack_sequences(prompts, tokens, "cpu"), temperatures=(1.0,))
    finally:
        parts.close()
    sampled = torch.tensor([p for row in replayed[step - 1] for p in row["sampling_logprobs"]])
    ratio = (trained - sampled).exp()

    assert line["replay/ratio_mean"] == pytest.approx(float(ratio.mean()), rel=1e-3)
    assert line["replay/logprob_gap_mean"] == pytest.approx(float((trained - sampled).abs().mean()), rel=1e-3)


def test_a_stopped_run_continues_bit_for_bit(finished, tiny_overrides, tmp_path):
    last = next(step for step, rows in reversed(list(enumerate(rows_of(finished, "replayed"), 1))) if rows)
    steps = ["checkpoint.every_steps=1", f"checkpoint.keep_last={NUM_STEPS}"]
    cut = run(*tiny_overrides, *REPLAY, *steps, f"training.num_steps={last - 1}", "hydra.run.dir=run", folder=tmp_path)
    assert cut.returncode == 0, cut.stdout + cut.stderr
    resumed = run(*tiny_overrides, *REPLAY, *steps, f"training.num_steps={NUM_STEPS}", "resume=run", folder=tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr

    assert sampled(tmp_path / "run") == sampled(finished)
    assert comparable(tmp_path / "run") == comparable(finished)
    states = [find_checkpoint(folder)[0].state for folder in (tmp_path / "run", finished)]
    assert states[0]["successes"] == states[1]["successes"] != {}
    assert states[0]["adapter_fingerprint"] == states[1]["adapter_fingerprint"]


def test_recorded_rollouts_are_those_of_the_steps_alone(finished, tiny_overrides):
    folder = finished.parent
    again = run("replay", "run", "--count", "20", folder=folder)
    scored = run("rescore", "run", folder=folder)
    settings = [f"training.num_steps={NUM_STEPS}", "engine=recorded", "engine.recorded_from=run"]
    trained = run(*tiny_overrides, *REPLAY, *settings, "hydra.run.dir=again", folder=folder)

    assert again.returncode == 0 and "20 of 20 rollouts are identical" in again.stdout, again.stdout + again.stderr
    assert f"advantages: 0 of {NUM_STEPS * 16} changed" in scored.stdout, scored.stdout + scored.stderr
    assert "algorithm.replay" in scored.stdout
    assert trained.returncode == 0, trained.stdout + trained.stderr
    states = [find_checkpoint(folder / name)[0].state for name in ("again", "run")]
    assert states[0]["adapter_fingerprint"] == states[1]["adapter_fingerprint"]


def test_it_is_off_by_default(short, tmp_path):  # noqa: F811
    history = finish(start(short, tmp_path / "run", *RARE, "training.num_steps=2", "tracking.save_rollouts=true"))

    assert not any(key.startswith("replay/") for line in history for key in line)
    assert not list((tmp_path / "run" / "rollouts").glob("replayed-*"))


def test_refills_are_drawn_for_groups_that_no_success_helps(short, tmp_path):  # noqa: F811
    options = [*REPLAY, "algorithm.max_refills=1", "data.limit=6", "algorithm.curriculum.is_on=true"]
    history = finish(start(short, tmp_path / "run", *options))

    assert max(line["replay/num_rollouts"] for line in history) > 0
    assert all(line["groups/num"] <= 8 for line in history)


def test_prompts_that_never_return_are_one_sentence(tiny_overrides, tmp_path):
    done = run(*tiny_overrides, "algorithm.replay.is_on=true", "training.num_steps=3", folder=tmp_path)

    check(done, "3 steps (training.num_steps) draw none of")


def test_a_missing_reward_is_one_sentence(tiny_overrides, tmp_path):
    options = ["algorithm.replay.is_on=true", "algorithm.replay.component=right"]

    check(
        run(*tiny_overrides, *options, folder=tmp_path), "algorithm.replay.component is 'right', but there is no such"
    )
