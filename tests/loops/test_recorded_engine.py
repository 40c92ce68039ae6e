"""Train-only replay: the updates of a recorded run again, without generating."""

from pathlib import Path

import pytest

from tests.loops.conftest import run
from tests.loops.test_recorded_runs import NUM_STEPS, recorded  # noqa: F401 (a fixture)
from tests.loops.test_rl_runs import comparable


def again(tiny_overrides, recorded: Path, folder: Path, *overrides: str):  # noqa: F811
    settings = [f"training.num_steps={NUM_STEPS}", "engine=recorded", f"engine.recorded_from={recorded}"]
    return run(*tiny_overrides, *settings, "hydra.run.dir=again", *overrides, folder=folder)


def test_the_same_settings_give_the_same_adapter_bytes(tiny_overrides, recorded, tmp_path):  # noqa: F811
    done = again(tiny_overrides, recorded, tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "engine=recorded answers no held-out problems: evaluation.*" in " ".join(done.stdout.split())
    assert "# talk with it" in done.stdout and "# train on" not in done.stdout  # there is nothing more to train on
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (recorded / name).read_bytes()
    same = ("reward/mean", "loss/total", "optim/grad_norm", "drift/logprob_gap_max")
    lines = [[[line.get(key) for key in same] for line in comparable(folder) if "reward/mean" in line]
             for folder in (recorded, tmp_path / "again")]  # fmt: skip
    assert lines[0] == lines[1] and len(lines[0]) == NUM_STEPS


def test_another_trainer_goes_on_and_its_drift_shows(tiny_overrides, recorded, tmp_path):  # noqa: F811
    done = again(
        tiny_overrides, recorded, tmp_path, "optim.lr=0.01", "checks.drift_stop_nats=9", "checks.drift_stop_ess_frac=0"
    )

    assert done.returncode == 0, done.stdout + done.stderr
    gaps = [line["drift/logprob_gap_max"] for line in comparable(tmp_path / "again") if "drift/logprob_gap_max" in line]
    assert gaps[0] < 1e-3 < gaps[-1]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["engine.recorded_from=nowhere"], "engine.recorded_from is nowhere, which holds no rollouts"),
        (["engine.recorded_from=null"], "engine.kind is recorded and engine.recorded_from is None"),
        (["training.num_steps=99"], f"holds rollouts of {NUM_STEPS} steps"),
        (["seed=5"], "which holds no rollout for a prompt of this run"),
        (["sampling.max_tokens=1"], "more tokens than sampling.max_tokens (1)"),
        (["sampling.top_p=0.9"], "engine=recorded needs plain sampling"),
        (
            ["rewards.components.share.path=tests.loops.letter_reward.rarely"],
            "rewards.components.share.path is tests.loops.letter_reward.rarely, but engine.recorded_from was recorded "
            "with tests.loops.letter_reward.share_of_a; expected the same",
        ),
        (["+rewards.components.other={path:tests.loops.letter_reward.rarely}"], "rewards.components has other, but"),
    ],
)
def test_rollouts_that_do_not_fit_are_one_sentence(tiny_overrides, recorded, tmp_path, overrides, sentence):  # noqa: F811
    done = again(tiny_overrides, recorded, tmp_path, *overrides)

    assert done.returncode == 2, done.stdout + done.stderr
    assert sentence in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
