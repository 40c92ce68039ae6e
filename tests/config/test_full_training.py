"""training.parameters=full: every setting that needs an adapter is refused, and what needs a frozen copy is named."""

from types import SimpleNamespace

import pytest

from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.chain import stage_configs
from rlbench.config.derive import derive
from rlbench.config.full_training import high_lr_note, needs_frozen_copy
from rlbench.config.resume import check_resumable
from rlbench.config.schema import (
    ChainStageConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PreferenceConfig,
    RewardsConfig,
    RunConfig,
    TrainingConfig,
)
from rlbench.models.memory import derive_recompute
from tests.config.test_algorithm_config import FACTS

REFUSED = {
    "an adapter's rank": (
        {"lora": LoraConfig(rank=8)},
        r"lora.rank is 8, .* no adapter is trained; expected its default",
    ),
    "an adapter to start from": (
        {"lora": LoraConfig(init_from="run")},
        "lora.init_from is run, .* expected model.path=RUN/model to start from a run of all weights",
    ),
    "a quantised base": (
        {"model": ModelConfig(quantization="nf4")},
        "model.quantization is nf4, .* quantised weights cannot be trained; expected none",
    ),
    "a reward model": ({"stage": "reward_model"}, "stage is reward_model, but training.parameters is full"),
    "a critic": ({"algorithm": AlgorithmConfig(advantage="gae")}, "algorithm.advantage is gae, .* its critic"),
    "a reference that follows": (
        {"algorithm": AlgorithmConfig(kl_coef=0.1, reference_refresh_steps=5)},
        "algorithm.reference_refresh_steps is 5, .* expected 0",
    ),
    "kernels of a frozen base": (
        {"training": TrainingConfig(parameters="full", recompute="mlp")},
        "training.recompute is mlp, .* expected auto, none or full",
    ),
    "a chain": ({"chain": [ChainStageConfig(name="sft")]}, "chain has stages, .* a chain hands on adapters"),
}


def full(**options) -> RunConfig:
    return RunConfig(**{"training": TrainingConfig(parameters="full"), **options})


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_an_adapter_is_refused(name):
    options, message = REFUSED[name]

    with pytest.raises(ValueError, match=f"{message}.*, or training.parameters=lora"):
        full(**options)


def test_an_unknown_choice_names_the_known_ones():
    with pytest.raises(ValueError, match="training.parameters is 'all', expected one of: lora, full"):
        TrainingConfig(parameters="all")


def test_a_stage_of_a_chain_is_refused_too():
    stages = [ChainStageConfig(name="sft", overrides=["stage=sft", "training.parameters=full"])]

    with pytest.raises(ValueError, match="stage 'sft' .* chain has stages, but training.parameters is full"):
        stage_configs(RunConfig(chain=stages))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, ""),
        ({"algorithm": AlgorithmConfig(kl_coef=0.1)}, "algorithm.kl_coef"),
        ({"rewards": RewardsConfig(components={"rm": {"path": "reward_model"}})}, "rewards.components.rm"),
        ({"stage": "sft"}, ""),
        ({"stage": "preference"}, ""),
        ({"stage": "preference", "preference": PreferenceConfig(reference="base")}, "preference.reference=base"),
    ],
)
def test_a_frozen_copy_is_held_only_where_something_reads_it(options, reason):
    config = full(**options)
    derive(config, FACTS)

    assert needs_frozen_copy(config) == reason
    assert needs_frozen_copy(RunConfig(**options)) == ""


def test_a_preference_run_writes_its_reference_down_before_it_starts():
    config = full(stage="preference")
    reasons = {d.key: d.reason for d in derive(config, FACTS)}

    assert (config.preference.reference, config.preference.precompute_reference) == ("start", True)
    assert reasons["preference.reference"] == "training.parameters is full: no second copy of the model is kept"


def test_on_a_gpu_all_layers_are_recomputed():
    config = full()
    config.hardware.profile = "gpu"

    (found,) = derive_recompute(config, FACTS, SimpleNamespace(model_type="llama"))

    assert (found.key, config.training.recompute, config.training.recompute_layers) == (
        "training.recompute", "full", None
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "lr", "source"),
    [("rl", 1e-6, "GRPOConfig"), ("sft", 2e-5, "SFTConfig"), ("preference", 1e-6, "DPOConfig")],
)
def test_all_weights_have_a_learning_rate_of_their_own_and_an_adapter_keeps_its(stage, lr, source):
    config = full(stage=stage)
    (found,) = (d for d in derive(config, FACTS) if d.key == "optim.lr")
    assert (config.optim.lr, found.value) == (lr, lr)
    assert found.reason == f"training.parameters is full: the default of TRL's {source}, which trains all weights too"

    adapter = RunConfig(stage=stage)
    (found,) = (d for d in derive(adapter, FACTS) if d.key == "optim.lr")
    assert (adapter.optim.lr, found.reason) == (1e-4, "of an adapter, in every stage")


@pytest.mark.parametrize("lr", [1e-4, 1e-6])
def test_a_learning_rate_that_is_set_stays(lr):
    for config in (full(optim=OptimConfig(lr=lr)), RunConfig(optim=OptimConfig(lr=lr))):
        assert not [d for d in derive(config, FACTS) if d.key == "optim.lr"] and config.optim.lr == lr


def test_an_adapters_learning_rate_for_all_weights_is_named():
    notes = {lr: high_lr_note(full(optim=OptimConfig(lr=lr))) for lr in (9e-6, 1e-5, 3e-4)}

    why = "(training.parameters is full: the default of TRL's GRPOConfig, which trains all weights too)"
    assert notes == {
        9e-6: "",
        1e-5: f"10 times 1e-06, which optim.lr=null would take {why}",
        3e-4: f"300 times 1e-06, which optim.lr=null would take {why}",
    }
    assert high_lr_note(RunConfig(optim=OptimConfig(lr=3e-4))) == ""


def test_a_resumed_run_keeps_what_it_trains():
    with pytest.raises(ValueError, match="training.parameters was 'lora' .* and is 'full' now"):
        check_resumable({"training": {"num_steps": 3}}, {"training": {"num_steps": 3, "parameters": "full"}})
    assert not check_resumable({"training": {"num_steps": 3}}, {"training": {"num_steps": 3, "parameters": "lora"}})
