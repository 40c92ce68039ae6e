"""Rewards that raise, hang, die, return NaN or the wrong count: the run goes on, nothing is a 0, metrics show it."""

import pytest

from rlbench.tracking.jsonl import read_metrics
from rlbench.tracking.rollout_store import read_groups
from tests.loops.conftest import run
from tests.loops.faulty_rewards import WAYS, way_of

PATH = "path:tests.loops.faulty_rewards"
STATUS = {"value": "value", "raises": "error", "hangs": "timeout", "nan": "error", "dies": "error"}


@pytest.fixture(scope="module")
def overrides(tiny_overrides) -> list[str]:
    return [
        *tiny_overrides,
        "~rewards.components.share",
        "~rewards.components.accuracy",
        f"+rewards.components.works={{{PATH}.by_length}}",
        "rewards.allowed_prefixes=[tests.loops.faulty_rewards]",
        "rewards.timeout_s=0.3",
        "rewards.max_invalid_frac=1.0",
        "evaluation.num_prompts=0",
        "training.num_steps=2",
        "hydra.run.dir=run",
    ]


def test_each_fault_is_its_outcome_and_the_run_goes_on(overrides, tmp_path):
    done = run(*overrides, f"+rewards.components.faulty={{{PATH}.one}}", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl", "train"))
    seen: dict[str, int] = dict.fromkeys(WAYS, 0)
    for step, line in enumerate(lines, start=1):
        groups = read_groups(tmp_path / "run" / "rollouts" / f"step-{step:06d}.parquet")
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        for rollout in rollouts:
            way, faulty = way_of(rollout.completion_text), rollout.components["faulty"]
            seen[way] += 1
            assert (faulty.status, faulty.value) == (STATUS[way], 1.0 if way == "value" else None)
            works = rollout.components["works"].value
            assert rollout.reward == (works + 1.0 if way == "value" else None)  # type: ignore[operator]
        ways = [way_of(rollout.completion_text) for rollout in rollouts]
        assert line["reward/timeout_frac"] == ways.count("hangs") / len(ways)
        assert line["reward/error_frac"] == sum(STATUS[way] == "error" for way in ways) / len(ways)
        assert line["rollouts/invalid_frac"] == 1 - ways.count("value") / len(ways)
        assert line["reward_pool/num_restarts"] >= len({w for w in ways if w in ("hangs", "dies")})
    assert len(lines) == 2 and min(seen.values()) > 0
    assert any(line.get("optim/num_updates") for line in lines)  # on the rollouts that have a reward


def test_a_wrong_count_is_an_error_of_every_rollout(overrides, tmp_path):
    done = run(*overrides, f"+rewards.components.faulty={{{PATH}.too_many}}", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl", "train"))
    assert [line["reward/error_frac"] for line in lines] == [1.0, 1.0]
    assert [line["optim/is_skipped"] for line in lines] == [1.0, 1.0] and "reward/mean" not in lines[0]


def test_too_many_rollouts_without_a_reward_stop_the_run(overrides, tmp_path):
    done = run(
        *overrides, f"+rewards.components.faulty={{{PATH}.too_many}}", "rewards.max_invalid_frac=0.2", folder=tmp_path
    )

    assert done.returncode == 5 and "rewards.max_invalid_frac" in done.stderr, done.stdout + done.stderr
