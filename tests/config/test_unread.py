"""A setting that another choice leaves unread is refused in a sentence that names both."""

import pytest

from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.curriculum import CurriculumConfig
from rlbench.config.derive import derive
from rlbench.config.optim import OptimConfig
from rlbench.config.replay import ReplayConfig
from rlbench.config.schema import (
    ChainStageConfig,
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    RewardsConfig,
    RunConfig,
)
from tests.config.test_algorithm_config import FACTS

GATED = {"format": {"path": "rlbench_rewards.tags.Tags", "gate_min": 1.0}}
WITHOUT_GATE = {"format": {"path": "rlbench_rewards.tags.Tags"}}
REFUSED = {
    "replay that is off": (
        {"algorithm": AlgorithmConfig(replay=ReplayConfig(max_age=3))},
        r"algorithm.replay.max_age is 3, but algorithm.replay.is_on is false; expected 64, or algorithm.replay.is_on",
    ),
    "a curriculum that is off": (
        {"algorithm": AlgorithmConfig(curriculum=CurriculumConfig(component="right"))},
        r"algorithm.curriculum.component is right, but algorithm.curriculum.is_on is false",
    ),
    "sampled answers of given completions": (
        {"stage": "sft", "evaluation": EvaluationConfig(num_samples=4)},
        r"evaluation.num_samples is 4, but stage=sft samples no answers; expected 0, or stage=rl",
    ),
    "the best of no evaluation": (
        {
            "engine": EngineConfig(kind="recorded", recorded_from="run"),
            "evaluation": EvaluationConfig(every_steps=1),
            "checkpoint": CheckpointConfig(keep_best="eval/accuracy"),
        },
        r"checkpoint.keep_best is eval/accuracy, but engine=recorded answers no held-out problems; expected null",
    ),
    "rewards that are read apart, as a product": (
        {"algorithm": AlgorithmConfig(advantage="gdpo"), "rewards": RewardsConfig(combine="product")},
        r"rewards.combine is product, but algorithm.advantage=gdpo reads each reward apart; expected sum",
    ),
    "rewards that are read apart, behind a gate": (
        {"algorithm": AlgorithmConfig(advantage="gdpo"), "rewards": RewardsConfig(components=GATED)},
        r"rewards.components.format.gate_min is 1.0, but algorithm.advantage=gdpo reads each reward apart and no gate",
    ),
    "a penalty that the first update cannot feel": (
        {"algorithm": AlgorithmConfig(advantage="group_relative", loss="kl_cov")},
        r"algorithm.loss is kl_cov, .* but algorithm.num_updates is 1; expected at least 2",
    ),
    "an end of a rate that stays": (
        {"optim": OptimConfig(schedule="constant", min_lr_frac=0.0)},
        r"optim.min_lr_frac is 0.0, but optim.schedule=constant never lowers the rate; expected 0.1",
    ),
    "a reward behind no gate": (
        {"rewards": RewardsConfig(gated_value=-1.0, components=WITHOUT_GATE)},
        r"rewards.gated_value is -1.0, but no component has a gate_min; expected 0.0",
    ),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_nothing_reads_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**settings)


def test_what_is_read_is_accepted():
    RunConfig(algorithm=AlgorithmConfig(replay=ReplayConfig(is_on=True, max_age=3)))
    RunConfig(evaluation=EvaluationConfig(num_samples=4))
    RunConfig(rewards=RewardsConfig(combine="product", components=GATED))
    RunConfig(algorithm=AlgorithmConfig(advantage="gdpo"))
    RunConfig(algorithm=AlgorithmConfig(loss="kl_cov", num_updates=2))
    RunConfig(optim=OptimConfig(schedule="constant"))
    RunConfig(rewards=RewardsConfig(gated_value=-1.0, components=GATED))


def test_a_chain_may_hold_what_one_of_its_stages_reads():
    RunConfig(stage="sft", evaluation=EvaluationConfig(num_samples=4), chain=[ChainStageConfig(name="a")])


@pytest.mark.parametrize(
    ("setting", "expected"), [({"kv_cache_gib": 2.0}, "null"), ({"dense_copies": "base"}, "null")], ids=str
)
def test_another_engine_refuses_what_is_vllms(setting, expected):
    name, value = next(iter(setting.items()))

    with pytest.raises(ValueError, match=f"engine.{name} is {value}, which engine=hf does not have; .*={expected}"):
        derive(RunConfig(engine=EngineConfig(kind="hf", **setting)), FACTS)
    derive(RunConfig(engine=EngineConfig(kind="hf", dense_copies="none")), FACTS)
