"""What tells two runs apart, on hand-written runs."""

import pytest

from rlbench.report.difference import common_window, number_differences, same_prompts, setting_differences
from rlbench.report.rollout_files import read_files
from rlbench.report.run_folder import load_run
from tests.report.conftest import make_group, write_run


def pair(tmp_path, a=None, b=None):
    return [load_run(write_run(tmp_path / name, **(options or {}))) for name, options in (("a", a), ("b", b))]


def test_settings_that_differ_come_with_the_reason_of_a_derived_one(tmp_path):
    a, b = pair(
        tmp_path,
        {
            "config": {"name": "x", "optim": {"lr": 1e-4}, "resume": "auto"},
            "derived": {"seed": {"value": 1, "reason": "x"}},
        },
        {"config": {"name": "x", "optim": {"lr": 3e-4, "eps": 1}, "resume": None}},
    )

    first, second = setting_differences(a, b)
    assert (first.key, first.a, first.b, first.reason_a, first.reason_b) == (
        "optim.lr", "0.0001", "0.0003", "", "because")  # fmt: skip
    assert (second.key, second.a, second.b) == ("optim.eps", "not set", "1")


def test_a_run_that_goes_on_is_compared_over_the_steps_that_both_have(tmp_path):
    a, b = pair(tmp_path, {"num_steps": 40}, {"num_steps": 16, "train": lambda step: {"reward/mean": 1.0}})

    window = common_window(a, b)
    (reward,) = [n for n in number_differences(a, b, window) if n.key == "reward/mean"]

    assert window == [13, 14, 15, 16]
    assert (reward.a, reward.b) == (pytest.approx(1.45), 1.0)
    # b has no spread; a's four values 1.3 to 1.6 have variance 1/60
    assert reward.two_standard_errors == pytest.approx(2 * (1 / 60 / 4) ** 0.5) and reward.is_clear


def test_the_window_of_a_long_run_is_not_searched_for_every_row(tmp_path):
    class Window(list):
        def __contains__(self, step):
            raise AssertionError("steps are looked up one by one")

    a, b = pair(tmp_path, {"num_steps": 16}, {"num_steps": 16})

    assert [n.key for n in number_differences(a, b, Window([13, 14, 15, 16]))][0] == "reward/mean"


def test_a_few_steps_get_no_verdict(tmp_path):
    a, b = pair(tmp_path, {"num_steps": 3}, {"num_steps": 3, "train": lambda step: {"reward/mean": 9.0}})

    reward = number_differences(a, b, common_window(a, b))[0]
    assert reward.two_standard_errors is None and not reward.is_clear


def test_runs_without_a_common_step_have_no_numbers(tmp_path):
    a, b = pair(tmp_path, {"num_steps": 0}, {"num_steps": 5})

    assert common_window(a, b) == [] and number_differences(a, b, []) == []


def test_the_same_prompts_are_those_with_the_same_text_most_different_first(tmp_path):
    def groups(rewards, prompt="2 + 2?"):
        return lambda step: [
            make_group(step, f"train/{i}", rewards=(reward, 0.0), prompt=prompt) for i, reward in enumerate(rewards)
        ]

    a, b = pair(tmp_path, {"groups": groups([0.0, 0.0, 0.5])}, {"groups": groups([0.1, 1.0, 0.5]), "num_steps": 4})
    files = [read_files(run.folder)[0] for run in (a, b)]

    found = same_prompts(*files, 2)
    assert [(s.step, s.a["prompt_id"], s.a["reward"], s.b["reward"]) for s in found] == [
        (4, "train/1", 0.0, 1.0), (4, "train/0", 0.0, 0.1)]  # fmt: skip

    other = load_run(write_run(tmp_path / "c", groups=groups([1.0], prompt="3 + 3?")))
    assert same_prompts(files[0], read_files(other.folder)[0], 2) == []
