"""lora.dropout: its range, and the stages that take it; lora.targets without the head."""

import pytest

from rlbench.config.chain import stage_configs
from rlbench.config.resume import check_resumable
from rlbench.config.schema import ChainStageConfig, LoraConfig, RunConfig, TrainingConfig


@pytest.mark.parametrize(
    ("dropout", "expected"), [(1.0, "less than 1"), (1.5, "less than 1"), (-0.1, "at least 0"), (float("nan"), "a num")]
)
def test_a_share_out_of_range_is_one_sentence(dropout, expected):
    with pytest.raises(ValueError, match=f"lora.dropout is {dropout}, expected {expected}"):
        LoraConfig(dropout=dropout)


def test_stages_on_given_rows_take_it_and_rl_does_not():
    for stage in ("sft", "preference", "reward_model"):
        assert RunConfig(stage=stage, lora=LoraConfig(dropout=0.1)).lora.dropout == 0.1
    assert RunConfig().lora.dropout == 0.0
    with pytest.raises(ValueError, match="lora.dropout is 0.1, but stage is rl, .*; expected 0, or another stage"):
        RunConfig(lora=LoraConfig(dropout=0.1))


def test_a_chain_takes_it_where_its_rl_stages_switch_it_off():
    def chain(*overrides):
        rl = ChainStageConfig(name="grpo", overrides=["stage=rl", *overrides])
        stages = [ChainStageConfig(name="sft", overrides=["stage=sft"]), rl]
        return stage_configs(RunConfig(lora=LoraConfig(dropout=0.1), chain=stages))

    assert [stage.lora.dropout for stage in chain("lora.dropout=0")] == [0.1, 0.0]
    with pytest.raises(ValueError, match=r"stage 'grpo' \(chain.1\): lora.dropout is 0.1, but stage is rl"):
        chain()


def test_without_an_adapter_it_is_refused():
    with pytest.raises(ValueError, match="lora.dropout is 0.1, but training.parameters is full"):
        RunConfig(stage="sft", lora=LoraConfig(dropout=0.1), training=TrainingConfig(parameters="full"))


def test_a_run_from_before_the_key_resumes_without_dropout_alone():
    saved = {"lora": {"rank": 16}}
    assert check_resumable(saved, {"lora": {"rank": 16, "dropout": 0.0}}) == []
    with pytest.raises(ValueError, match="lora.dropout was 0.0 in the run that is resumed and is 0.1 now"):
        check_resumable(saved, {"lora": {"rank": 16, "dropout": 0.1}})


@pytest.mark.parametrize("targets", ["lm_head", "q_proj, lm_head"])
def test_the_head_is_no_target(targets):
    with pytest.raises(ValueError, match=f"lora.targets is {targets}, but the head stays as it is"):
        LoraConfig(targets=targets)
