"""Runs with a critic: warm-up, resuming, options together, and the experiment as a user starts it."""

from rlbench.tracking.jsonl import read_metrics
from rlbench.training.checkpoint import find_checkpoint
from tests.loops.conftest import run
from tests.loops.test_algorithm_families import finish, short, start  # noqa: F401 (short is a fixture)

CRITIC = ["algorithm=ppo", "algorithm.critic.lr=0.003", "optim.schedule=constant"]
LOWERCASE = "+rewards.components.lowercase={path:tests.loops.letter_reward.share_of_lowercase}"  # rarely 0


def test_in_the_warm_up_only_the_critic_learns(short, tmp_path):  # noqa: F811
    options = [*CRITIC, LOWERCASE, "algorithm.critic.warmup_steps=25", "algorithm.critic.returns_lambda=1"]
    loop = start(short, tmp_path / "run", *options, "algorithm.prompts_per_step=16", "training.num_steps=25")
    before = loop.parts.policy.adapter().fingerprint()
    history = finish(loop)

    assert loop.parts.policy.adapter().fingerprint() == before
    assert {line["policy_version"] for line in history} == {0.0}
    assert history[-1]["value/loss"] < 0.5 * history[0]["value/loss"]
    # Rewards of a random policy are mostly noise; what a state tells of the rest is learned from many of them.
    assert sum(line["value/explained_var"] for line in history[-5:]) / 5 > 0.03
    assert {"value/loss", "value/explained_var", "value/clip_frac", "value/mean"} <= history[0].keys()


def test_a_stopped_run_continues_with_its_critic_bit_for_bit(short, tmp_path):  # noqa: F811
    whole = finish(start(short, tmp_path / "whole", *CRITIC, "training.num_steps=4"))
    finish(start(short, tmp_path / "cut", *CRITIC, "training.num_steps=2"))
    second = start(short, tmp_path / "cut", *CRITIC, "training.num_steps=4", resume_from_step=2)
    second.resume(find_checkpoint(tmp_path / "cut")[0])

    for ours, theirs in zip(finish(second), whole[2:], strict=True):
        same = [k for k in theirs if not k.startswith(("time/", "tokens/")) and not k.endswith(("_s", "_gib"))]
        assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
        assert "value/loss" in same and "loss/policy" in same


def test_a_penalty_and_the_value_after_a_cut_run_together(short, tmp_path):  # noqa: F811
    options = [
        "algorithm.kl_coef=0.05",
        "algorithm.critic.bootstrap_truncated=true",
        "algorithm.group_size=1",
        LOWERCASE,
    ]
    history = finish(start(short, tmp_path / "run", *CRITIC, *options, "training.num_steps=2"))

    assert history[1]["kl/reference"] != 0 and history[1]["value/mean"] != 0


def test_the_experiment_runs_and_its_adapter_is_the_policys(tiny_overrides, tmp_path):
    done = run("+exp=ppo_gsm8k", *tiny_overrides, "training.num_steps=3", "hydra.run.dir=run", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl", "train")
    assert [line["policy_version"] for line in lines] == [0, 0, 4]  # two steps of warm-up
    checkpoint = find_checkpoint(tmp_path / "run")[0].folder
    assert (checkpoint / "critic" / "adapter" / "value_head.safetensors").is_file()
    assert not (tmp_path / "run" / "adapter" / "value_head.safetensors").exists()
