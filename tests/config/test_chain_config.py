"""A chain's stages are composed and checked before anything runs."""

from dataclasses import asdict

import pytest

from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.chain import stage_configs
from rlbench.config.compose import to_run_config
from rlbench.config.preference import PreferenceConfig
from rlbench.config.schema import ChainStageConfig, RewardsConfig, RunConfig
from tests.architecture.test_layout import compose


@pytest.fixture
def config() -> RunConfig:
    return to_run_config(compose("+exp=chain_gsm8k"))


def test_each_stage_is_the_shared_settings_with_its_overrides(config):
    sft, grpo, dpo = stage_configs(config)

    assert [stage.stage for stage in (sft, grpo, dpo)] == ["sft", "rl", "preference"]
    assert [stage.optim.lr for stage in (sft, grpo, dpo)] == [2e-4, 3e-4, 1e-4]
    assert grpo.algorithm.loss == "clipped_surrogate" and list(grpo.rewards.components) == ["accuracy", "format"]
    assert sft.rewards.components == {} and dpo.preference.losses == ["sigmoid"]


def test_a_stage_is_the_same_run_as_its_experiment_alone(config):
    sft = asdict(stage_configs(config)[0])
    alone = asdict(to_run_config(compose("+exp=sft_gsm8k")))

    assert {key for key in alone if alone[key] != sft[key]} == {"name"}


def test_a_shared_setting_reaches_the_stages_that_read_it(config):
    config.sampling.max_tokens = 33
    config.training.num_steps = 7
    sft, grpo, dpo = stage_configs(config)

    assert [stage.training.num_steps for stage in (sft, grpo, dpo)] == [7, 7, 7]
    assert grpo.sampling.max_tokens == 33 and sft.sampling == dpo.sampling == RunConfig().sampling


def test_a_shared_setting_that_no_stage_reads_is_an_error(config):
    config.sampling.max_tokens = 33
    config.chain, config.preference = [config.chain[0]], PreferenceConfig()
    config.rewards, config.algorithm = RewardsConfig(), AlgorithmConfig()  # rewards=none algorithm=none

    with pytest.raises(ValueError, match=r"stage 'sft' \(chain.0\): sampling.max_tokens is 33, but stage=sft does not"):
        stage_configs(config)


WRONG = {
    "a value": (["optim.lr=-1"], "optim.lr is -1.0, expected more than 0"),
    "a type": (["optim.lr=fast"], "optim.lr is 'fast', expected a number"),
    "a key": (["optim.lrr=1"], "there is no key 'optim.lrr'; nearest valid keys: optim.lr"),
    "a section": (["optimm.lr=1"], "there is no key 'optimm"),
    "a choice": (["preference=dpoo"], "preference=dpoo: there is no such choice, expected one of: cdpo"),
    "a stage": (["stage=dpo"], "stage is 'dpo', expected one of: rl, sft, preference"),
    "no value": (["optim.lr"], "cannot read the override 'optim.lr'"),
    "an unread key": (["sampling.max_tokens=9"], "sampling.max_tokens is 9, but stage=preference does not read it"),
    "an adapter of its own": (["lora.init_from=x"], "lora.init_from is set in overrides, but the chain sets it"),
    "an experiment": (["+exp=dpo_gsm8k"], "exp is set in overrides, but the chain sets it"),
    "another rank": (["lora.rank=4"], "lora.rank is 4, but stage 'sft' has 16; expected the same in all stages"),
}


@pytest.mark.parametrize(("overrides", "sentence"), WRONG.values(), ids=WRONG)
def test_a_mistake_in_the_last_stage_names_stage_and_key(config, overrides, sentence):
    config.chain[2].overrides += overrides

    with pytest.raises(ValueError) as caught:
        stage_configs(config)
    assert str(caught.value).startswith(f"stage 'dpo' (chain.2): {sentence}")


@pytest.mark.parametrize("given", ["optim.lr=1", "algorithm.kl_coef=0.1"])
def test_a_command_line_setting_that_a_stage_would_undo_is_an_error(config, given):
    config.chain[1].overrides.append("algorithm=grpo")
    with pytest.raises(ValueError, match=f"{given.split('=')[0]} is set on the command line, but the stage's override"):
        stage_configs(config, [given])
    stage_configs(config, [given, "chain.1.overrides=[...]"] if "algorithm" in given else [])
    stage_configs(config, ["training.num_steps=3", "+exp=chain_gsm8k", "~rewards.components.format"])


@pytest.mark.parametrize(("name", "sentence"), [("sft", "as chain.0.name"), ("a/b", "expected letters")])
def test_names_are_folders(config, name, sentence):
    config.chain[1] = ChainStageConfig(name=name)

    with pytest.raises(ValueError, match=f"chain.1.name is '{name}', {sentence}"):
        stage_configs(config)
