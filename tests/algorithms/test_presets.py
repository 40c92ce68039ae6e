"""What `algorithm=NAME` and `preference=NAME` compose to is what their papers use, and what the README says.

Composed as a run's settings are; where a preset leaves out what its paper has, its file says so.
"""

import re
from functools import cache

import pytest
from hydra import compose, initialize_config_dir

from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.compose import config_folder, group_choices, register_schema, to_run_config
from rlbench.config.schema import RunConfig
from tests.algorithms.test_documentation import README, rows

PPO_CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_max": None}
GSPO_CLIP = {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}
GROUP, PLAIN = ("group_relative", "group"), ("group_relative", "none")
# (advantage, its scale), loss, its options, normalization, updates x minibatches
PAPERS = {
    "grpo": (GROUP, "clipped_surrogate", PPO_CLIP, "token_mean", (1, 1)),
    "dapo": (GROUP, "clipped_surrogate", PPO_CLIP | {"clip_ratio_high": 0.28}, "token_mean", (1, 1)),
    "dr_grpo": (PLAIN, "clipped_surrogate", PPO_CLIP, "constant", (1, 1)),
    "gspo": (GROUP, "gspo", GSPO_CLIP, "sequence_mean", (4, 4)),
    "luspo": (GROUP, "gspo", GSPO_CLIP, "sequence_sum", (1, 1)),
    "gmpo": (GROUP, "gmpo", {"clip_log_ratio_low": 0.4, "clip_log_ratio_high": 0.4}, "sequence_mean", (1, 1)),
    "cispo": (GROUP, "cispo", {"clip_ratio_max": 5.0}, "token_mean", (1, 1)),
    "sapo": (GROUP, "sapo", {"gate_temperature_pos": 1.0, "gate_temperature_neg": 1.05}, "sequence_mean", (1, 1)),
    "vespo": (
        GROUP, "vespo", {"gamma_k_pos": 2, "gamma_lambda_pos": 3, "gamma_k_neg": 3, "gamma_lambda_neg": 2},
        "token_mean", (1, 1),
    ),
    "clip_cov": (
        GROUP, "clip_cov", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "covariance_frac": 2e-4,
        "covariance_low": 1, "covariance_high": 5}, "token_mean", (1, 1),
    ),
    "kl_cov": (GROUP, "kl_cov", {"covariance_frac": 2e-3, "covariance_kl_coef": 1}, "token_mean", (2, 1)),
    "reinforce": (PLAIN, "reinforce", {}, "token_mean", (1, 1)),
    "rloo": (
        ("leave_one_out", "none"), "sequence_surrogate", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2},
        "sequence_mean", (1, 1),
    ),
    "ppo": (("gae", "batch"), "clipped_surrogate", PPO_CLIP, "token_mean", (4, 2)),
    "reinforce_plus_plus": (("reinforce_plus_plus", None), "clipped_surrogate", PPO_CLIP, "token_mean", (1, 1)),
    "reinforce_plus_plus_baseline": (
        ("reinforce_plus_plus_baseline", None), "clipped_surrogate", PPO_CLIP, "token_mean", (1, 1)
    ),
    "gdpo": (("gdpo", None), "clipped_surrogate", PPO_CLIP, "token_mean", (1, 1)),
    "maxrl": (("maxrl", None), "reinforce", {}, "token_mean", (1, 1)),
    "distillation": (("teacher", None), "reinforce", {}, "token_mean", (1, 1)),
}  # fmt: skip
KL = {  # estimator, where, coefficient; GRPO's k3 in the loss elsewhere, off
    "rloo": ("k1", "reward", 0.0),
    "ppo": ("k1", "reward", 0.0),
    "reinforce_plus_plus": ("k1", "reward", 0.001),
    "reinforce_plus_plus_baseline": ("k2", "loss", 0.0),
}
BETA = {"beta": 0.1}
PREFERENCES = {
    "dpo": [("sigmoid", 1.0, BETA)],
    "dpo_norm": [("sigmoid_norm", 1.0, {"beta": 5.0})],
    "cdpo": [("cdpo", 1.0, BETA | {"label_smoothing": 0.1})],
    "ipo": [("ipo", 1.0, BETA)],
    "simpo": [("simpo", 1.0, {"beta": 2.0, "reward_margin": 0.5})],
    "cpo": [("cpo", 1.0, BETA | {"nll_coef": 1.0})],
    "orpo": [("orpo", 1.0, BETA)],
    "kto": [("kto", 1.0, BETA | {"desirable_weight": 1.0, "undesirable_weight": 1.0})],
    "mpo": [("sigmoid", 0.8, BETA), ("bco_pair", 0.2, BETA), ("sft", 1.0, {})],
    "wpo": [("sigmoid", 1.0, BETA)],
}
MEANS = {
    "tokens": "token_mean", "sequences": "sequence_mean", "sum by sequence": "sequence_sum", "constant": "constant"
}  # fmt: skip


@cache
def composed(*overrides: str) -> RunConfig:
    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return to_run_config(compose("config", overrides=list(overrides)))


def algorithm_of(name: str) -> AlgorithmConfig:
    return composed(f"algorithm={name}").algorithm


def scale_of(config: AlgorithmConfig) -> object:
    return config.advantage_scale or config.resolved_defaults().get("advantage_scale", (None,))[0]


def test_every_preset_is_looked_at():
    assert set(PAPERS) | {"none", "online_dpo"} == set(group_choices("algorithm"))
    assert set(PREFERENCES) | {"none"} == set(group_choices("preference"))


@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_has_the_settings_of_its_paper(name):
    config = algorithm_of(name)

    found = (
        (config.advantage, scale_of(config)), config.loss, config.loss_options(), config.normalization,
        (config.num_updates, config.num_minibatches),
    )  # fmt: skip
    assert found == PAPERS[name]
    assert (config.kl, config.kl_in, config.kl_coef) == KL.get(name, ("k3", "loss", 0.0))
    assert config.max_refills == (3 if name == "dapo" else 0)
    assert (config.mask_truncated, config.overlong_buffer_tokens, config.entropy_coef) == (False, 0, 0.0)


@pytest.mark.parametrize("name", PAPERS)
def test_the_correction_of_the_sampler_is_tis_but_where_the_loss_weighs_it_itself(name):
    config = algorithm_of(name)

    assert config.importance_method == ("off" if name == "vespo" else "truncate")
    if name != "vespo":
        assert config.importance_options() == {"level": "token", "low": None, "high": 2.0}


@pytest.mark.parametrize("name", PAPERS)
def test_the_row_of_a_preset_says_its_mean(name):
    assert MEANS[rows("algorithm=")[name][3]] == algorithm_of(name).normalization


def test_the_readme_says_which_presets_make_several_updates():
    (sentence,) = re.findall(r"(?:`\w+`,?\s(?:and\s)?)+make several by themselves", README)
    assert set(re.findall(r"`(\w+)`", sentence)) == {n for n, paper in PAPERS.items() if paper[-1] != (1, 1)}


def test_ppo_has_the_critic_of_its_paper():
    critic = algorithm_of("ppo").critic

    assert (critic.gae_lambda, critic.gamma, critic.clip_value, critic.returns_lambda) == (0.95, 1.0, 0.2, None)


def test_distillation_judges_each_token_by_itself():
    assert algorithm_of("distillation").teacher.gamma == 0.0


def test_online_dpo_takes_the_best_and_the_worst_and_the_loss_of_dpo():
    config = composed("algorithm=online_dpo")

    assert (config.algorithm.pairs.choice, config.algorithm.pairs.min_gap) == ("best_worst", 0.0)
    assert config.preference.weighted_losses() == PREFERENCES["dpo"]


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_preference_has_the_settings_of_its_paper(name):
    config = composed("stage=preference", f"preference={name}", "rewards=none", "algorithm=none").preference

    assert config.weighted_losses() == PREFERENCES[name]
    assert (config.divergence, config.wpo) == ("reverse_kl", name == "wpo")


@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        ({"importance": "mask"}, ("token", 0.5, 5.0)),
        ({"importance": "mask", "importance_level": "sequence"}, ("sequence", None, 3.0)),
        ({"importance": "mask", "importance_level": "geometric"}, ("geometric", 0.99, 1.01)),
        ({"importance_level": "sequence"}, ("sequence", None, 2.0)),
        ({"importance_level": "geometric"}, ("geometric", None, 2.0)),
    ],
)
def test_corrections_have_the_bounds_of_their_papers(options, bounds):
    level, low, high = bounds

    assert AlgorithmConfig(**options).importance_options() == {"level": level, "low": low, "high": high}
