"""Preflights on the tiny model with planted cases: each is told apart, and named with the setting to change."""

import json
from itertools import combinations
from pathlib import Path
from statistics import fmean, median

import pytest

from tests.loops.conftest import run, run_afresh

STOPS = f"sampling.stop_token_ids={list(range(2, 32))}"  # 30 of 98 tokens end a completion: next to none is cut
SMALL = ["--prompts", "12", "--samples", "8", "hydra.run.dir=flight", "algorithm.group_size=4"]


def fly(tiny_overrides, folder: Path, reward: str, *overrides: str, launch=run):
    """The finished process and the JSON that it wrote."""
    kept = [o for o in tiny_overrides if not o.startswith(("+rewards", "rewards", "algorithm.group_size"))]
    done = launch(
        "preflight",
        *kept,
        f"+rewards.components.accuracy={{path:tests.loops.planted_rewards.{reward}}}",
        "rewards.allowed_prefixes=[tests.loops.planted_rewards]",
        *SMALL,
        *overrides,
        folder=folder,
    )
    written = folder / "flight" / "preflight.json"
    assert written.exists(), done.stdout + done.stderr
    return done, json.loads(written.read_text())


def names(result) -> dict[str, str]:
    return {finding["name"]: finding["level"] for finding in result["findings"]}


@pytest.fixture(scope="module")
def healthy(tiny_overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("healthy")
    return *fly(tiny_overrides, folder, "half", STOPS, launch=run_afresh), folder / "flight"


def test_a_healthy_policy_is_go_without_a_word_against_it(healthy):
    done, result, _ = healthy

    assert done.returncode == 0 and result["is_go"] and result["findings"] == []
    assert "GO" in done.stdout and "nothing speaks against this run" in done.stdout
    assert 0.3 < result["numbers"]["pass_at"]["1"]["value"] < 0.7


def test_the_numbers_are_those_of_the_samples(healthy):
    _, result, folder = healthy
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["rollout_id"].rsplit("/", 1)[0], []).append(row["reward"])
    draws = [list(combinations(rewards, 4)) for rewards in groups.values()]

    numbers = result["numbers"]
    assert len(rows) == 12 * 8
    assert numbers["pass_at"]["1"]["value"] == pytest.approx(fmean(row["reward"] for row in rows))
    assert numbers["pass_at"]["4"]["value"] == pytest.approx(fmean(fmean(any(d) for d in each) for each in draws))
    assert numbers["no_signal"]["value"] == pytest.approx(
        fmean(fmean(len(set(d)) == 1 for d in each) for each in draws)
    )
    assert numbers["truncated"]["value"] == fmean(row["finish_reason"] == "length" for row in rows)
    lengths = {row["rollout_id"]: row["num_tokens"] for row in rows}
    assert [lengths[i] for i in result["shortest"]] == sorted(lengths.values())[:10]
    assert [lengths[i] for i in result["longest"]] == sorted(lengths.values())[:-11:-1]


def test_times_are_scaled_from_the_sample_to_the_step(healthy):
    times, measured = healthy[1]["times"], healthy[1]["measured_s"]

    assert len(measured["generation"]) == 3  # 12 prompts, 4 a step
    assert times["phases"]["generation"] == pytest.approx(median(measured["generation"]) / 2)  # 8 samples for 4
    assert times["step_s"] == pytest.approx(sum(times["phases"].values())) and times["phases"]["update"] > 0
    assert times["run_s"] > 24 * times["step_s"]


def test_everything_right_asks_for_harder_problems(tiny_overrides, tmp_path):
    done, result = fly(tiny_overrides, tmp_path, "right", STOPS)

    assert done.returncode == 7 and names(result) == {"constant reward": "stop"}
    assert "every completion got the reward 1" in done.stdout and "harder problems" in done.stdout
    assert result["numbers"]["no_signal"]["value"] == 1.0


def test_everything_wrong_asks_for_a_warm_start_or_easier_problems(tiny_overrides, tmp_path):
    done, result = fly(tiny_overrides, tmp_path, "wrong", STOPS)

    assert done.returncode == 7 and names(result) == {"constant reward": "stop"}
    assert "lora.init_from=RUN" in result["findings"][0]["advice"]
    assert result["numbers"]["pass_at"]["4"]["value"] == 0.0


def test_everything_cut_asks_for_more_tokens(tiny_overrides, tmp_path):
    done, result = fly(tiny_overrides, tmp_path, "half", "sampling.max_tokens=2")

    assert done.returncode == 7 and names(result) == {"truncation": "stop"}
    assert "sampling.max_tokens=4" in result["findings"][0]["advice"]


def test_a_verifier_that_breaks_is_named_and_counts_as_neither_right_nor_wrong(tiny_overrides, tmp_path):
    done, result = fly(tiny_overrides, tmp_path, "broken_for_odd", STOPS)

    assert done.returncode == 7
    assert list(names(result)) == ["broken rewards", "constant reward"]
    assert "accuracy ended in error" in done.stdout and "the verifier fell over" in result["findings"][0]["text"]
    assert 0.2 < result["numbers"]["invalid_frac"] < 0.8
    assert result["numbers"]["pass_at"]["1"]["value"] == 1.0  # of those with a verdict


def test_a_verifier_that_is_too_slow_asks_for_a_longer_timeout(tiny_overrides, tmp_path):
    done, result = fly(tiny_overrides, tmp_path, "slow", STOPS, "rewards.timeout_s=0.05", "--prompts", "2")

    assert done.returncode == 7 and names(result) == {"broken rewards": "stop"}
    assert "rewards.timeout_s (now 0.05)" in result["findings"][0]["advice"]
    assert result["numbers"]["pass_at"] == {} and result["numbers"]["metrics"]["reward/timeout_frac"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompts", "0"], "--prompts is 0, expected at least 1"),
        (["--samples", "x"], "invalid int value: 'x'"),
        (["stage=sft", "+exp=sft_gsm8k"], "stage is sft, but preflight samples a policy"),
        (["optim.lrr=1"], "there is no key 'optim.lrr'"),
    ],
)
def test_a_wrong_call_gets_one_sentence_and_leaves_no_folder(tiny_folder, tmp_path, arguments, sentence):
    done = run("preflight", f"model.path={tiny_folder}", *arguments, folder=tmp_path)

    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_fewer_samples_than_a_group_are_refused(tiny_overrides, tmp_path):
    done = run("preflight", *tiny_overrides, "--samples", "2", folder=tmp_path)

    assert done.returncode == 2 and "--samples is 2, expected at least algorithm.group_size (8)" in done.stderr
    assert not (tmp_path / "outputs").exists()
