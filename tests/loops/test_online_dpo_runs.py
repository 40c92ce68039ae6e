"""Online DPO in the online loop: other losses, a reference that is kept or moves, resuming, the experiment."""

import json

import pytest

from rlbench.tracking.jsonl import read_metrics
from rlbench.training.checkpoint import find_checkpoint
from tests.loops.conftest import run
from tests.loops.test_algorithm_families import finish, short, start  # noqa: F401 (short is a fixture)
from tests.loops.test_critic_runs import LOWERCASE
from tests.loops.test_user_errors import check

ONLINE = ["algorithm=online_dpo", "preference=dpo", "optim.schedule=constant", "optim.lr=0.005"]


def same(ours: dict, theirs: dict) -> None:
    keys = [k for k in theirs if not k.startswith(("time/", "tokens/")) and not k.endswith(("_s", "_gib"))]
    assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}


def resumed(short, folder, *options):  # noqa: F811
    finish(start(short, folder, *ONLINE, *options, "training.num_steps=2"))
    second = start(short, folder, *ONLINE, *options, "training.num_steps=4", resume_from_step=2)
    second.resume(find_checkpoint(folder)[0])
    return finish(second)


@pytest.mark.parametrize("options", [
    ["algorithm.pairs.choice=all", "algorithm.pairs.min_gap=0.05", "algorithm.num_updates=2",
     "algorithm.num_minibatches=2"],
    ["algorithm.reference_refresh_steps=1", "algorithm.reference_refresh_frac=0.5", "preference=ipo"],
], ids=["all pairs", "a moving reference"])  # fmt: skip
def test_a_stopped_run_continues_bit_for_bit(short, tmp_path, options):  # noqa: F811
    whole = finish(start(short, tmp_path / "whole", *ONLINE, *options, "training.num_steps=4"))

    for ours, theirs in zip(resumed(short, tmp_path / "cut", *options), whole[2:], strict=True):
        same(ours, theirs)
        assert {"loss/preference", "preference/accuracy", "kl/reference", "pairs/num"} <= theirs.keys()


def test_the_metrics_are_those_of_pairs_and_the_drift_is_measured(short, tmp_path):  # noqa: F811
    history = finish(start(short, tmp_path / "run", *ONLINE, "training.num_steps=3"))

    assert history[0]["loss/preference"] == pytest.approx(0.6931, abs=1e-4)  # the policy begins as the reference
    assert history[0]["kl/reference"] == pytest.approx(0.0, abs=1e-5) and history[2]["kl/reference"] != 0
    assert [line["pairs/num"] for line in history] == [
        line["groups/num"] * (1 - line["groups/no_signal_frac"]) for line in history
    ]
    assert history[1]["drift/logprob_gap_mean"] < 1e-3
    assert "loss/policy" not in history[0] and "importance/weight_mean" not in history[0]


def test_a_reference_that_moves_stays_nearer(short, tmp_path):  # noqa: F811
    far = finish(start(short, tmp_path / "far", *ONLINE, "training.num_steps=4"))
    near = finish(
        start(short, tmp_path / "near", *ONLINE, "training.num_steps=4", "algorithm.reference_refresh_steps=1")
    )

    assert near[1]["loss/preference"] == pytest.approx(0.6931, abs=1e-4)
    assert far[1]["loss/preference"] != pytest.approx(0.6931, abs=1e-4)


def test_after_a_warm_start_the_reference_is_the_policy_that_training_starts_from(short, tmp_path):  # noqa: F811
    first = start(short, tmp_path / "first", LOWERCASE, "training.num_steps=2", "optim.lr=0.002")
    finish(first)
    place = find_checkpoint(tmp_path / "first")[0].folder
    history = finish(
        start(short, tmp_path / "second", *ONLINE, LOWERCASE, f"lora.init_from={place}", "training.num_steps=2")
    )

    assert history[0]["loss/preference"] == pytest.approx(0.6931, abs=1e-4)
    assert history[1]["loss/preference"] != pytest.approx(0.6931, abs=1e-4)


def test_dynamic_sampling_draws_until_enough_groups_make_a_pair(short, tmp_path):  # noqa: F811
    options = [
        "algorithm.max_refills=3",
        "+rewards.components.rare={path:tests.loops.letter_reward.rarely}",
        "~rewards.components.share",
        "training.num_steps=2",
    ]
    history = finish(start(short, tmp_path / "run", *ONLINE, *options))

    assert max(line["groups/num_refills"] for line in history) > 0
    for line in history:
        assert line["pairs/num"] >= 4 or line["groups/num_refills"] == 3


def test_the_experiment_runs_and_leaves_a_report(tiny_overrides, tmp_path):
    done = run("+exp=online_dpo_gsm8k", *tiny_overrides, "training.num_steps=2", "hydra.run.dir=run", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "algorithm.pairs" in done.stdout and "1 sigmoid" in done.stdout
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl", "train"))
    assert [line["policy_version"] for line in lines] == [1, 2]
    assert "pairs/num" in (tmp_path / "run" / "report.html").read_text()
    assert json.loads((tmp_path / "run" / "derived.json").read_text())["preference.reference"]["value"] == "base"
    rescored = run("rescore", "run", folder=tmp_path)
    assert rescored.returncode == 0, rescored.stdout + rescored.stderr
    assert "the run trains on pairs of rollouts" in rescored.stdout


ERRORS = {
    "a policy loss": (["algorithm.loss=gspo"], "algorithm.loss is gspo, but with algorithm.pairs.choice=best_worst"),
    "a critic": (["algorithm.critic.gamma=0.9"], "algorithm.critic.gamma is 0.9, but with algorithm.pairs.choice"),
    "a gap without pairs": (
        ["algorithm=grpo", "preference=none", "algorithm.pairs.min_gap=1"],
        "algorithm.pairs.min_gap is 1.0, but algorithm.pairs.choice is none",
    ),
    "single completions": (["preference=kto"], "preference.losses is ['kto'], but algorithm.pairs makes pairs"),
    "a count of pairs": (["preference.pairs_per_step=4"], "preference.pairs_per_step is 4, but with algorithm.pairs"),
    "a reference before": (
        ["preference.precompute_reference=true"], "preference.precompute_reference is true, but rollouts are not known"
    ),
    "a base that moves": (
        ["algorithm.reference_refresh_steps=2", "preference.reference=base"],
        "algorithm.reference_refresh_steps is 2, but preference.reference is base",
    ),
    "losses of another update": (
        ["algorithm=grpo", "preference=ipo"], "preference.losses is ['ipo'], but stage=rl does not read it"
    ),
    "one completion": (["algorithm.group_size=1"], "algorithm.group_size is 1, expected at least 2"),
    "another choice": (["algorithm.pairs.choice=best"], "algorithm.pairs.choice is 'best', expected one of: none"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_a_mistake_is_one_sentence(name, tmp_path):
    options, message = ERRORS[name]

    check(run("+exp=online_dpo_gsm8k", *options, folder=tmp_path), message)
