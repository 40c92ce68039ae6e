"""What is set must be read: every option that a choice ignores is an error that says so."""

import pytest

from rlbench.config.algorithm import ADVANTAGES, LOSSES, AlgorithmConfig
from rlbench.config.derive import HardwareFacts, derive
from rlbench.config.pairs import PairsConfig
from rlbench.config.replay import ReplayConfig
from rlbench.config.schema import RunConfig, SamplingConfig

FACTS = HardwareFacts(
    device="cpu",
    device_name="a CPU",
    num_cores=2,
    memory_gib=8.0,
    matmul_gflops={"float32": 1.0, "bfloat16": 2.0},
    vllm_problem="absent",
)

ERRORS = {
    "an option of another loss": (
        {"loss": "reinforce", "clip_ratio_low": 0.1},
        r"algorithm.clip_ratio_low is 0.1, but algorithm.loss=reinforce does not read it; .* clipped_surrogate",
    ),
    "an unknown loss": ({"loss": "gspoo"}, r"algorithm.loss is 'gspoo', expected one of: .*did you mean gspo\?"),
    "an unknown normalization": ({"normalization": "tokens"}, "algorithm.normalization is 'tokens', expected one of"),
    "a scale that is fixed": (
        {"advantage": "maxrl", "advantage_scale": "group"},
        "algorithm.advantage_scale is group, but algorithm.advantage=maxrl fixes its own scale",
    ),
    "a scale it does not have": (
        {"advantage": "leave_one_out", "advantage_scale": "group"},
        "algorithm.advantage_scale is 'group', expected one of: batch, none",
    ),
    "a group of one": ({"group_size": 1}, "algorithm.group_size is 1, expected at least 2"),
    "a cap below the clip": ({"clip_ratio_max": 1.1}, "algorithm.clip_ratio_max is 1.1, expected more than 1.2"),
    "crossed covariances": (
        {"loss": "clip_cov", "covariance_low": 6.0}, "algorithm.covariance_low is above algorithm.covariance_high"
    ),
    "importance twice": (
        {"loss": "vespo", "importance": "truncate"}, "algorithm.loss=vespo weighs against the engine's policy itself"
    ),
    "bounds without importance": (
        {"importance": "off", "importance_high": 2.0},
        "algorithm.importance_high is 2.0, but algorithm.importance is off",
    ),
    "crossed bounds": (
        {"importance_low": 3.0}, r"algorithm.importance_low is 3.0, expected at most algorithm.importance_high \(2.0\)"
    ),
    "unbiased KL in the reward": (
        {"kl": "k3_unbiased", "kl_in": "reward", "kl_coef": 0.1}, "algorithm.kl is k3_unbiased with algorithm.kl_in"
    ),
    "KL in a reward that is normalised apart": (
        {"advantage": "gdpo", "kl_in": "reward", "kl_coef": 0.1},
        "algorithm.kl_in is reward with algorithm.advantage=gdpo",
    ),
    "rollouts used unequally": (
        {"num_updates": 3, "num_minibatches": 2}, "algorithm.num_updates is 3, expected a multiple"
    ),
    "crossed bounds of the entropy control": (
        {"entropy_target": 1.0, "entropy_coef_min": 0.5, "entropy_coef_max": 0.1},
        r"algorithm.entropy_coef_min is 0.5, expected at most algorithm.entropy_coef_max \(0.1\)",
    ),
    "entropy control without a target": (
        {"entropy_coef_max": 0.5}, "algorithm.entropy_coef_max is 0.5, but algorithm.entropy_target is null"
    ),
    "refills for groups of one": (
        {"advantage": "reinforce_plus_plus", "group_size": 1, "max_refills": 2}, "algorithm.max_refills is 2, but with"
    ),
    "a penalty without a slope": (
        {"overlong_penalty": 1.0}, "algorithm.overlong_penalty is 1.0, but algorithm.overlong_buffer_tokens is 0"
    ),
    "tokens chosen, sequences moved": (
        {"loss": "gspo", "top_entropy_frac": 0.2}, "algorithm.loss=gspo has one ratio a sequence"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_would_be_ignored_is_an_error(name):
    options, message = ERRORS[name]

    with pytest.raises(ValueError, match=message):
        AlgorithmConfig(**options)


SUPPORT_ERRORS = {
    "penalties": ({}, {"presence_penalty": 0.5}, r"sampling.presence_penalty is 0.5, but .*; expected 0.0, or"),
    "repetition": ({}, {"repetition_penalty": 1.2}, r"sampling.repetition_penalty is 1.2, but .*; expected 1.0, or"),
    "a guide": ({}, {"guided_choice": ["a"]}, "sampling.guided_choice is set, but algorithm.support=sampler"),
    "a reference": (
        {"kl_coef": 0.1},
        {},
        r"algorithm.kl_coef is 0.1, but .* the reference would keep .*; expected 0, or",
    ),
    "a teacher": ({"advantage": "teacher"}, {}, "algorithm.advantage is teacher, but .* the teacher would keep"),
    "older policies": ({"replay": ReplayConfig(is_on=True)}, {}, "algorithm.replay.is_on is true, but .*; expected no"),
}


@pytest.mark.parametrize("name", SUPPORT_ERRORS)
def test_the_samplers_support_refuses_what_has_another(name):
    algorithm, sampling, message = SUPPORT_ERRORS[name]

    RunConfig(algorithm=AlgorithmConfig(**algorithm), sampling=SamplingConfig(**sampling))
    RunConfig(algorithm=AlgorithmConfig(support="sampler"), sampling=SamplingConfig(top_p=0.9))
    with pytest.raises(ValueError, match=message):
        RunConfig(algorithm=AlgorithmConfig(support="sampler", **algorithm), sampling=SamplingConfig(**sampling))


def test_pairs_do_not_read_a_support():
    with pytest.raises(ValueError, match="algorithm.support is sampler, but with algorithm.pairs.choice=all"):
        AlgorithmConfig(support="sampler", pairs=PairsConfig(choice="all"))


def test_a_slope_longer_than_the_completion():
    with pytest.raises(ValueError, match=r"overlong_buffer_tokens is 100, expected at most sampling.max_tokens \(64\)"):
        RunConfig(algorithm=AlgorithmConfig(overlong_buffer_tokens=100), sampling=SamplingConfig(max_tokens=64))


def test_more_minibatches_than_groups():
    config = RunConfig(algorithm=AlgorithmConfig(num_minibatches=8, num_updates=8))

    with pytest.raises(ValueError, match=r"num_minibatches is 8, expected at most algorithm.prompts_per_step \(4\)"):
        derive(config, FACTS)


@pytest.mark.parametrize("loss", LOSSES)
def test_defaults_are_filled_in_with_their_reason_and_stay_valid(loss):
    config = RunConfig(algorithm=AlgorithmConfig(loss=loss, num_updates=2))
    reasons = {d.key: d.reason for d in derive(config, FACTS)}

    for name, default in LOSSES[loss].options.items():
        assert getattr(config.algorithm, name) == default
        assert default is None or reasons[f"algorithm.{name}"] == f"default of loss={loss}"
    assert config.algorithm.importance == ("off" if LOSSES[loss].weighs_sampler else "truncate")
    again = AlgorithmConfig(**vars(config.algorithm))  # what config.yaml holds can be read back
    assert again.loss_options() == AlgorithmConfig(loss=loss, num_updates=2).loss_options()


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_the_scale_of_each_advantage_is_filled_in(advantage):
    config = RunConfig(algorithm=AlgorithmConfig(advantage=advantage))
    derive(config, FACTS)

    assert config.algorithm.advantage_scale == ADVANTAGES[advantage].default_scale


def test_what_is_set_wins_over_defaults():
    config = RunConfig(algorithm=AlgorithmConfig(clip_ratio_low=0.1, importance="mask", importance_low=0.0))
    derive(config, FACTS)

    assert config.algorithm.loss_options()["clip_ratio_low"] == 0.1
    assert config.algorithm.importance_options() == {"level": "token", "low": 0.0, "high": 5.0}
