"""What is held beside base and policy takes its room: numbers by hand from the models' shapes."""

import json

import pytest
import yaml

from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.derive import derive
from rlbench.config.pairs import PairsConfig
from rlbench.config.schema import PreferenceConfig, RewardsConfig, RunConfig, TrainingConfig
from rlbench.config.teacher import TeacherConfig
from rlbench.models.held_models import held_models
from tests.models.test_fit import MODELS, config_of, derived, facts_of

GIB = 2**30


def held_gib(name: str, config: RunConfig) -> dict[str, float]:
    derive(config, facts_of(80.0))
    return {model.name: model.num_bytes / GIB for model in held_models(config, MODELS[name])}


def with_algorithm(**options) -> RunConfig:
    config = config_of()
    config.algorithm = AlgorithmConfig(**options)
    return config


def test_a_critic_is_a_second_adapter_with_its_optimizer():
    # rank 16 x 32 layers x (2 x (4,096 + 4,096) + 2 x (4,096 + 1,024) + 3 x (4,096 + 14,336)) numbers of 18 bytes:
    # float32, its gradient, two moments, and the cast to 16 bits
    assert held_gib("Llama-3.1-8B", with_algorithm(advantage="gae")) == {"the critic": 0.703125}
    assert held_gib("Llama-3.1-8B", config_of()) == {}


@pytest.mark.parametrize(
    ("advantage", "cache", "recompute", "num_layers"), [("group_relative", 2.9, "mlp", 31), ("gae", 2.2, "full", 26)]
)
def test_a_critic_takes_keys_and_values_and_makes_layers_recompute(advantage, cache, recompute, num_layers):
    config = with_algorithm(advantage=advantage)
    config.training.tokens_per_microbatch = 2048
    found = derived("Llama-3.1-8B", 24.0, config)

    # 0.9 of 24, less 14.96 of the base, 0.70 of the adapter, 3 of reserves: 2.94; less 0.70 of the critic: 2.24.
    # Less 0.34 of the backward pass: 682,598 or 498,278 numbers a token. 33 layers' 55,296, less 36,864 of 31.0 layers
    # without gate and up, or less 51,200 of 25.9 layers of which the input alone stays.
    assert found["engine.kv_cache_gib"].value == cache
    assert (config.training.recompute, config.training.recompute_layers) == (recompute, num_layers)
    is_named = [", the critic (0.7 GiB)" in found[k].reason for k in ("engine.kv_cache_gib", "training.recompute")]
    assert is_named == [advantage == "gae"] * 2


def test_what_does_not_fit_names_what_is_beside_the_base():
    # 0.9 of 20.9, less 14.96, 0.70, 0.70 and 3
    with pytest.raises(
        ValueError, match=r"takes 15.0 GiB .*none\); beside it are the critic \(0.7 GiB\), which leaves 0"
    ):
        derived("Llama-3.1-8B", 20.9, with_algorithm(advantage="gae"))


def reward_model_run(folder, rank: int):
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "value_head.safetensors").write_bytes(b"")
    saved = {"stage": "reward_model", "model": {"path": "llama", "quantization": "none"}, "lora": {"rank": rank}}
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))


@pytest.mark.parametrize(("is_there", "cache"), [(True, 1.5), (False, 2.4)])
def test_a_reward_model_has_an_adapter_of_its_own_rank_and_its_forward_runs_beside_the_cache(is_there, cache, tmp_path):
    if is_there:
        reward_model_run(tmp_path / "rm", rank=64)
    config = config_of()
    component = {"path": "reward_model", "kwargs": {"run": str(tmp_path / "rm")}}
    config.model.path, config.rewards = "llama", RewardsConfig(components={"liked": component})
    config.training.tokens_per_microbatch = 2048
    found = derived("Llama-3.1-8B", 24.0, config)["engine.kv_cache_gib"]

    # 2.94 as above; of the forward 2,048 x (3 x 14,336 + 4 x 4,096) + 2 x 14,336 x 4,096 numbers of 2 bytes: 0.45; the
    # adapter's 64 x 32 x 81,920 numbers of 4 and 2 bytes: 0.94
    assert found.value == cache
    words = "reward model liked (0.9 GiB)" if is_there else "the reward model (not there yet, not counted)"
    assert f"beside the base, {words}, up to" in found.reason


def model_folder(folder, name: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(vars(MODELS[name])))
    return str(folder)


def taught(model: str | None, adapter: str | None = None) -> RunConfig:
    return with_algorithm(advantage="teacher", loss="reinforce", teacher=TeacherConfig(model=model, adapter=adapter))


def test_a_teacher_is_a_second_base(tmp_path):
    config = taught(model_folder(tmp_path / "teacher", "Qwen2.5-1.5B"))
    found = derived("Qwen2.5-0.5B", 8.0, config)

    # 0.9 of 8, less 0.92 of the base, 0.15 of the adapter, 3 of reserves: 3.13; less 2.88 of the teacher: 0.25
    assert found["engine.kv_cache_gib"].value == 0.2
    assert ", the teacher (2.9 GiB), up to" in found["engine.kv_cache_gib"].reason
    # 4,096 tokens: 24 inputs of 896 and one layer's 15,360 numbers, 0.28; 2,048 and their backward pass: 0.19
    assert found["training.tokens_per_microbatch"].value == 2048


def test_the_forward_pass_of_a_larger_teacher_limits_the_microbatch(tmp_path):
    config = taught(model_folder(tmp_path / "teacher", "Llama-3.1-8B"))
    config.model.quantization = "nf4"
    found = derived("Qwen2.5-0.5B", 11.0, config)

    # 0.9 of 11, less 0.43, 0.15, 3 and 5.31 of the teacher: 1.01. 8,192 tokens: the student's forward and backward pass
    # 0.71, the teacher's forward 8,192 x (3 x 14,336 + 4 x 4,096) + 2 x 14,336 x 4,096 numbers: 1.13; of 4,096: 0.67
    assert found["training.tokens_per_microbatch"].value == 4096


def test_a_teacher_that_is_an_adapter_takes_its_rank(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    saved = {"r": 64, "lora_alpha": 64, "use_rslora": False, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))

    # rank 64 x 32 layers x 81,920 numbers of 4 and, cast, 2 bytes
    assert held_gib("Llama-3.1-8B", taught(None, str(tmp_path))) == {"the teacher": 0.9375}


def test_a_teacher_whose_size_is_not_known_is_named(tmp_path):
    folder = model_folder(tmp_path / "teacher", "Qwen2.5-1.5B")
    (tmp_path / "teacher" / "config.json").write_text('{"model_type": "phi3"}')
    expected = [
        (taught(folder), "the teacher (a phi3 model, not counted)"),
        (taught(str(tmp_path / "nothing.gguf")), "the teacher (its config.json cannot be had, not counted)"),
        (taught(None, str(tmp_path / "nothing")), "the teacher (its adapter is not there yet, not counted)"),
    ]

    for config, words in expected:
        assert [model.words for model in held_models(config, MODELS["Llama-3.1-8B"])] == [words]


def test_a_reference_that_is_not_the_base_is_an_adapter_without_an_optimizer():
    # rank 16 x 32 layers x 81,920 numbers of 4 and, cast, 2 bytes
    refreshed = with_algorithm(kl_coef=0.1, reference_refresh_steps=5)
    pairs = with_algorithm(pairs=PairsConfig(choice="best_worst"))
    pairs.preference = PreferenceConfig(reference="start")

    assert held_gib("Llama-3.1-8B", refreshed) == {"the reference's adapter": 0.234375}
    assert held_gib("Llama-3.1-8B", pairs) == {"the reference's adapter": 0.234375}


@pytest.mark.parametrize(("kl_coef", "cache"), [(0.0, 14.3), (0.1, 11.4)])
def test_a_frozen_copy_is_a_second_base(kl_coef, cache):
    config = RunConfig(algorithm=AlgorithmConfig(kl_coef=kl_coef), training=TrainingConfig(parameters="full"))
    config.sampling.max_tokens = 1024
    found = derived("Qwen2.5-1.5B", 48.0, config)["engine.kv_cache_gib"]

    # 0.9 of 48, less 2.88 of the base, 1.54 billion numbers of 16 bytes, 3 of reserves: 14.3; less 2.88 of the copy
    assert found.value == cache
    assert ("a frozen copy for algorithm.kl_coef (2.9 GiB)" in found.reason) == bool(kl_coef)
