"""One short run for each family of conf/algorithm, in this process: the reward rises on a task with a known optimum."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from rlbench.build import build, prepare
from rlbench.config.compose import config_folder, group_choices, register_schema, to_run_config
from rlbench.loops.rl import RlLoop
from rlbench.loops.stopping import StopRequest
from rlbench.loops.watchdog import Watchdog
from rlbench.tracking.console import RunConsole
from rlbench.tracking.jsonl import JsonlWriter
from rlbench.tracking.tracker import Tracker
from rlbench.training.checkpoint import find_checkpoint
from tests.loops.conftest import ENVIRONMENT

NUM_STEPS = 8
# One update at this learning rate moves sequences of the tiny model further than GSPO's clip, made for large ones.
OPTIONS = {
    "gspo": ["algorithm.clip_ratio_low=0.2", "algorithm.clip_ratio_high=0.3"],
    "online_dpo": ["optim.lr=0.005", "algorithm.num_updates=4"],  # one pair a group: fewer completions are read
}


def start(overrides: list[str], folder: Path, *options: str, resume_from_step: int | None = None) -> RlLoop:
    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = to_run_config(compose("config", overrides=[*overrides, *options]))
    inputs = prepare(config)
    console = RunConsole(quiet=True)
    folder.mkdir(exist_ok=True)
    jsonl = JsonlWriter(folder / "metrics.jsonl", resume_from_step=resume_from_step)
    tracker = Tracker(jsonl, config.training.num_steps or 0, None, console, 0)
    stop = StopRequest(console.warning, grace_s=20)
    return RlLoop(
        inputs=inputs, parts=build(inputs), tracker=tracker, console=console, run_folder=folder, stop=stop,
        watchdog=Watchdog(config.watchdog, stop, folder),
    )  # fmt: skip


def finish(loop: RlLoop) -> list[dict]:
    try:
        loop.run()
    finally:
        loop.tracker.close()
        loop.parts.scorer.close()
        loop.parts.engine.close()
    return [dict(line) for line in loop.history]


@pytest.fixture
def short(tiny_overrides, monkeypatch) -> list[str]:
    for name in ("PYTHONPATH", "HF_HUB_OFFLINE", "WANDB_MODE"):
        monkeypatch.setenv(name, ENVIRONMENT[name])  # of the reward workers
    return [
        *tiny_overrides,
        f"training.num_steps={NUM_STEPS}",
        "evaluation.num_prompts=0",
        "checkpoint.every_steps=0",
        "tracking.save_rollouts=false",
        "rewards.num_workers=1",
        "hardware=cpu",
        "hardware.num_threads=1",  # the model is tiny
    ]


@pytest.mark.parametrize("algorithm", [name for name in group_choices("algorithm") if name != "distillation"])
def test_the_reward_rises(short, tmp_path, algorithm):
    history = finish(start(short, tmp_path / "run", f"algorithm={algorithm}", *OPTIONS.get(algorithm, [])))
    rewards = [line["reward/mean"] for line in history]

    assert len(rewards) == NUM_STEPS
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2, rewards
    assert not any(line["optim/is_skipped"] for line in history[:3])  # at the optimum no group has a signal


def test_versions_count_optimizer_steps(short, tmp_path):
    options = [
        "algorithm.num_updates=4",
        "algorithm.num_minibatches=2",
        "training.num_steps=2",
        "optim.lr=0.001",
        "+rewards.components.lowercase={path:tests.loops.letter_reward.share_of_lowercase}",  # every group has a signal
    ]
    loop = start(short, tmp_path / "run", *options)
    history = finish(loop)

    assert [line["policy_version"] for line in history] == [4.0, 8.0]
    assert history[0]["policy/kl_to_old"] > 0


def test_dynamic_sampling_draws_prompts_until_enough_groups_differ(short, tmp_path):
    options = [
        "algorithm.max_refills=3",
        "+rewards.components.rare={path:tests.loops.letter_reward.rarely}",
        "~rewards.components.share",
        "training.num_steps=3",
    ]
    history = finish(start(short, tmp_path / "run", *options))

    for line in history:
        num_groups = line["groups/num"]
        num_good = round(num_groups * (1 - line["groups/no_signal_frac"]))
        assert num_good >= 4 or line["groups/num_refills"] == 3
    assert max(line["groups/num_refills"] for line in history) > 0
    assert max(line["groups/num"] for line in history) > 4


def test_a_stopped_run_continues_with_its_entropy_coefficient(short, tmp_path):
    options = ["algorithm.entropy_target=10.0", "algorithm.entropy_coef_delta=0.001", "optim.schedule=constant"]
    whole = finish(start(short, tmp_path / "whole", *options, "training.num_steps=4"))
    first = start(short, tmp_path / "cut", *options, "training.num_steps=2")
    finish(first)
    second = start(short, tmp_path / "cut", *options, "training.num_steps=4", resume_from_step=2)
    second.resume(find_checkpoint(tmp_path / "cut")[0])
    assert second.entropy_control.coef == pytest.approx(0.002)
    rest = finish(second)

    assert [line["entropy/coef"] for line in whole] == pytest.approx([0.001, 0.002, 0.003, 0.004])
    for ours, theirs in zip(rest, whole[2:], strict=True):
        same = [
            k for k in theirs if not k.startswith(("time/", "tokens/", "optim/")) and not k.endswith(("_s", "_gib"))
        ]
        assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}


def test_a_penalty_in_the_reward_holds_the_policy_near_its_base(short, tmp_path):
    near, far = (
        finish(start(short, tmp_path / str(coef), "algorithm=rloo", f"algorithm.kl_coef={coef}"))[-1]["kl/reference"]
        for coef in (1.0, 0.0001)
    )

    assert near < 0.5 * far


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_a_reference_that_follows_is_nearer_and_resumes_bit_for_bit(short, tmp_path, kl_in):
    kl = [f"algorithm.kl_in={kl_in}", "algorithm.kl=k1", "algorithm.kl_coef=0.001", "optim.schedule=constant"]
    refresh = [*kl, "algorithm.reference_refresh_steps=2", "algorithm.reference_refresh_frac=0.9"]
    far = finish(start(short, tmp_path / "far", *kl, "training.num_steps=4"))
    whole = finish(start(short, tmp_path / "near", *refresh, "training.num_steps=4"))
    finish(start(short, tmp_path / "cut", *refresh, "training.num_steps=3"))
    second = start(short, tmp_path / "cut", *refresh, "training.num_steps=4", resume_from_step=3)
    second.resume(find_checkpoint(tmp_path / "cut")[0])
    rest = finish(second)

    assert [line["kl/reference"] for line in far[:2]] == [line["kl/reference"] for line in whole[:2]]
    assert 0 < abs(whole[2]["kl/reference"]) < 0.5 * abs(far[2]["kl/reference"])
    assert rest[-1]["kl/reference"] == whole[-1]["kl/reference"]
    assert rest[-1]["loss/total"] == whole[-1]["loss/total"]


CURRICULUM = [
    "algorithm.curriculum.is_on=true",
    "+rewards.components.rare={path:tests.loops.letter_reward.rarely,weight:0.0}",
    "algorithm.curriculum.component=rare",
    "optim.schedule=constant",
]


def test_a_curriculum_is_measured_and_a_stopped_run_continues_with_it(short, tmp_path):
    whole = finish(start(short, tmp_path / "whole", *CURRICULUM, "training.num_steps=4"))
    first = start(short, tmp_path / "cut", *CURRICULUM, "training.num_steps=2")
    finish(first)
    second = start(short, tmp_path / "cut", *CURRICULUM, "training.num_steps=4", resume_from_step=2)
    second.resume(find_checkpoint(tmp_path / "cut")[0])
    rest = finish(second)

    assert [line["curriculum/measured_frac"] for line in whole][:2] == [0.0, 4 / 40]
    assert all(0 < line["curriculum/expected_signal_frac"] < 1 for line in whole)
    for key in ("reward/mean", "curriculum/measured_frac", "curriculum/expected_signal_frac", "loss/total"):
        assert [line[key] for line in rest] == [line[key] for line in whole[2:]], key


def test_a_curriculum_needs_its_reward(short, tmp_path):
    with pytest.raises(ValueError, match="algorithm.curriculum.component is 'right', but there is no such reward"):
        start(short, tmp_path / "run", "algorithm.curriculum.is_on=true", "algorithm.curriculum.component=right")


def test_a_profiled_step_changes_nothing_and_leaves_its_table(short, tmp_path):
    options = ["algorithm=ppo", "training.num_steps=2"]
    plain = finish(start(short, tmp_path / "plain", *options))
    with_profile = finish(start(short, tmp_path / "run", *options, "tracking.profile_step=2"))

    assert [line["loss/total"] for line in with_profile] == [line["loss/total"] for line in plain]
    names = sorted(path.name for path in (tmp_path / "run" / "profile").iterdir())
    assert names == [
        f"step-000002_{phase}.{kind}" for phase in ("critic_update", "update") for kind in ("trace.json.gz", "txt")
    ]
    assert "AdamW.step" in (tmp_path / "run" / "profile" / "step-000002_update.txt").read_text()
