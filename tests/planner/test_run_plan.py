"""The plan in a run's folder: whose it is, and what autograd keeps."""

import json
import os
from dataclasses import asdict

import pytest

from rlbench.config.schema import LoraConfig, OptimConfig, RunConfig, SamplingConfig, TrainingConfig
from rlbench.models.policy import Policy
from rlbench.planner.run_plan import count_kept, find_measured_plan, planned_settings, scored_logits_bytes


def write_plan(folder, config, peak):
    folder.mkdir(parents=True)
    path = folder / "plan.json"
    path.write_text(json.dumps({"config": planned_settings(asdict(config)), "plan": {"peak_gib": peak}, "source": "x"}))
    return path


def test_the_newest_plan_for_the_same_settings_is_taken(tmp_path):
    config = RunConfig(optim=OptimConfig(lr=3e-4))
    old, new = write_plan(tmp_path / "plan_1", config, 1.0), write_plan(tmp_path / "plan_2", config, 2.0)
    write_plan(tmp_path / "plan_3", RunConfig(sampling=SamplingConfig(max_tokens=9)), 3.0)
    (tmp_path / "plan_4").mkdir()
    (tmp_path / "plan_4" / "plan.json").write_text("{")
    os.utime(old, (1, 1))

    for folder in (tmp_path / "run", tmp_path / "sweep" / "0"):  # of a run alone, of a run of a sweep
        found = find_measured_plan(config, folder)
        assert found is not None and found["plan"]["peak_gib"] == 2.0 and str(new) in found["source"]
    assert find_measured_plan(RunConfig(seed=7, name="other", optim=OptimConfig(lr=3e-4)), tmp_path / "run") is not None
    assert find_measured_plan(RunConfig(sampling=SamplingConfig(max_tokens=10)), tmp_path / "run") is None


def test_what_is_kept_grows_with_the_tokens_and_shrinks_where_layers_are_recomputed(tiny_base):
    policy = Policy(tiny_base, LoraConfig(), seed=0)
    (few, few_bytes), (many, many_bytes) = count_kept(policy, 16), count_kept(policy, 64)
    per_token = (many_bytes - few_bytes) / (many - few)
    # Input, q, k, v, attention's output, two norms, gate, up of each layer in float32, and no less.
    assert per_token > 2 * 4 * (64 + 64 + 32 + 32 + 64 + 2 * 64 + 2 * 96)

    policy.set_recompute(TrainingConfig(recompute="full"))
    (few, few_bytes), (many, many_bytes) = count_kept(policy, 16), count_kept(policy, 64)
    assert (many_bytes - few_bytes) / (many - few) < 0.5 * per_token


def vllm_config(profile: str, identity_tokens: int) -> RunConfig:
    config = RunConfig()
    config.engine.kind, config.hardware.profile = "vllm", profile
    config.checks.identity_tokens = identity_tokens
    return config


@pytest.mark.parametrize(
    ("vocabulary", "peak", "without"),
    [(151_936, 13.1988, 11.9942), (128_256, 28.2021, 27.1923)],  # GiB: GRPO rows of scripts/results/plan_h200.json
)
def test_the_engines_logits_of_the_identity_check_are_what_a_formula_without_them_lacked(vocabulary, peak, without):
    lacking = scored_logits_bytes(vllm_config("gpu", 4096), vocabulary) / 2**30

    assert lacking == pytest.approx(peak - without, rel=0.05)


def test_fewer_tokens_than_one_part_have_fewer_logits_and_other_engines_none():
    assert scored_logits_bytes(vllm_config("gpu", 100), 1000) == 100 * 1000 * 4
    assert scored_logits_bytes(vllm_config("cpu", 4096), 1000) == 0
    assert scored_logits_bytes(RunConfig(), 1000) == 0
