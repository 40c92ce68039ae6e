"""Runs that older versions recorded are read; what is given on top of them is held to what new runs are held to."""

from dataclasses import asdict, is_dataclass
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from rlbench.config.recorded import recorded_config, trained_settings
from rlbench.config.renamed import rename_settings
from rlbench.config.resume import check_resumable, keep_derived
from rlbench.config.schema import RunConfig
from tests.config.test_unread import REFUSED

SLOW_REWARD = {"components": {"a": {"path": "rlbench_rewards.tags.Tags", "timeout_s": 3600.0}}}
RECORDED = {  # settings, the key that is read as another value, and that value
    "dropout while sampling": ({"lora": {"dropout": 0.1}}, "lora.dropout", 0.0),
    "rewards below 0": (
        {"algorithm": {"advantage": "maxrl", "overlong_buffer_tokens": 4}}, "algorithm.advantage", "group_relative",
    ),
    "a reward without a watchdog": ({"rewards": SLOW_REWARD}, "watchdog.limit_s", 0.0),
    "a reward and a phase's limit": (
        {"rewards": SLOW_REWARD, "watchdog": {"phase_limits_s": {"rewards": 60.0}}},
        "watchdog.phase_limits_s.rewards",
        0.0,
    ),
    "evaluations of no problems": (
        {"evaluation": {"num_prompts": 0, "every_steps": 5}}, "evaluation.every_steps", 0,
    ),
    "the best of no evaluations": ({"checkpoint": {"keep_best": "eval/accuracy"}}, "checkpoint.keep_best", None),
    "galore of adamw": ({"optim": {"galore": {"rank": 8, "scale": 0.5}}}, "optim.galore.rank", 128),
    "weights of sorted pairs": (
        {"stage": "preference", "preference": {"losses": ["aot_pair"], "wpo": True}}, "preference.wpo", False,
    ),
    "refills of single completions": (
        {"algorithm": {"advantage": "reinforce_plus_plus", "group_size": 1, "max_refills": 2}},
        "algorithm.max_refills",
        0,
    ),
    "sampling of given completions": ({"stage": "sft", "sampling": {"stop": ["x"]}}, "sampling.stop", []),
    "vLLM's cache of another engine": ({"engine": {"kind": "hf", "kv_cache_gib": 2.0}}, "engine.kv_cache_gib", None),
    "vLLM's numbers of another engine": (
        {"engine": {"kind": "hf", "kv_cache_dtype": "fp8"}}, "engine.kv_cache_dtype", "auto",
    ),
    "a profile of no step": (
        {"training": {"num_steps": 4}, "tracking": {"profile_step": 9}}, "tracking.profile_step", None,
    ),
}  # fmt: skip
RENAMED = {
    "algorithm.scale_by_std": {True: ("advantage_scale", "group"), False: ("advantage_scale", "none")},
    "engine.dequantize": {
        True: ("dense_copies", "base"),
        False: ("dense_copies", "none"),
        None: ("dense_copies", None),
    },
    "training.recompute": {"except_attention": ("recompute", "full")},
}


def write(folder: Path, settings: dict) -> Path:
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def value_of(config: RunConfig, key: str) -> object:
    return OmegaConf.select(OmegaConf.create(asdict(config)), key)


@pytest.mark.parametrize(("settings", "key", "instead"), RECORDED.values(), ids=RECORDED.keys())
def test_a_run_with_settings_that_are_refused_now_is_read_and_says_so(tmp_path, capsys, settings, key, instead):
    found = value_of(recorded_config(write(tmp_path, settings)), key)

    assert (found or None) == (instead or None)
    said = capsys.readouterr().err
    assert f"{tmp_path / 'config.yaml'}: {key.removesuffix('.rank')}=" in said and "is read as" in said


@pytest.mark.parametrize("settings", [settings for settings, _ in REFUSED.values()], ids=REFUSED.keys())
def test_a_run_with_what_nothing_reads_is_read(tmp_path, settings):
    with pytest.raises(ValueError):
        RunConfig(**settings)

    recorded = {name: asdict(part) if is_dataclass(part) else part for name, part in settings.items()}
    read = recorded_config(write(tmp_path, recorded))

    assert RunConfig(**{name: getattr(read, name) for name in settings}) is not None


def test_settings_that_are_read_stay_and_nothing_is_said(tmp_path, capsys):
    settings = {"algorithm": {"replay": {"is_on": True, "max_age": 3}}, "optim": {"min_lr_frac": 0.0}}

    found = recorded_config(write(tmp_path, settings))

    assert (found.algorithm.replay.max_age, found.optim.min_lr_frac) == (3, 0.0)
    assert capsys.readouterr() == ("", "")


def test_what_is_read_as_something_else_is_said_once(tmp_path, capsys):
    write(tmp_path, {"algorithm": {"replay": {"max_age": 3}}})

    for _ in range(3):
        recorded_config(tmp_path)

    assert capsys.readouterr().err.splitlines() == [
        f"note: {tmp_path / 'config.yaml'}: algorithm.replay.max_age=3 is read as 64: nothing reads it"
    ]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("algorithm.replay.max_age=3", "algorithm.replay.max_age is 3, but algorithm.replay.is_on is false"),
        ("optim.schedule=constant", None),
        ("optim.min_lr_frac=0.5", "optim.min_lr_frac is 0.5, but optim.schedule=constant never lowers"),
        ("algorithm.num_updates=1", "algorithm.loss is kl_cov, whose penalty has no gradient"),
        ("algorithm.nosuch=1", "nosuch"),
    ],
)
def test_what_the_call_sets_is_refused_as_in_a_new_run(tmp_path, override, sentence):
    algorithm = {"replay": {"max_age": 3}, "loss": "kl_cov", "num_updates": 1}
    write(tmp_path, {"algorithm": algorithm, "optim": {"schedule": "constant", "min_lr_frac": 0.0}})

    if sentence is None:
        assert recorded_config(tmp_path, [override]).optim.min_lr_frac == 0.1
        return
    with pytest.raises(Exception, match=sentence):
        recorded_config(tmp_path, [override])


@pytest.mark.parametrize(("key", "then"), [(key, value) for key in RENAMED for value in RENAMED[key]])
def test_a_setting_with_another_name_now_is_read_as_what_it_meant(tmp_path, capsys, key, then):
    section, name = key.split(".")
    new_name, now = RENAMED[key][then]

    found = recorded_config(write(tmp_path, {section: {name: then}}))

    assert getattr(getattr(found, section), new_name) == now
    said = f"{tmp_path / 'config.yaml'}: {key}={str(then).lower()} is read as {section}.{new_name}={now}"
    assert (said in capsys.readouterr().err) == (now is not None)


def test_a_setting_under_both_names_is_not_decided_here(tmp_path):
    write(tmp_path, {"engine": {"dequantize": True, "dense_copies": "merged"}})

    with pytest.raises(ValueError, match=r"has engine.dequantize=true, which this version of rlbench does not know"):
        recorded_config(tmp_path)


def test_other_values_and_settings_keep_their_names():
    settings = {"seed": 1, "training": {"recompute": "mlp"}, "engine": {"dequantize": "much"}, "optim": None}

    assert rename_settings(settings) == (settings, [])


def test_a_resumed_run_is_told_of_what_training_read_alone(tmp_path):
    algorithm = {"replay": {"max_age": 3}, "loss": "kl_cov", "num_updates": 1, "scale_by_std": False}
    settings = {"algorithm": algorithm, "training": {"recompute": "except_attention"}}
    now = asdict(recorded_config(write(tmp_path, settings)))

    (told,) = check_resumable(trained_settings(tmp_path), now)

    assert told.startswith("algorithm.num_updates was 1 in the run that is resumed and is 2 now")
    assert now["algorithm"]["advantage_scale"] == "none"


def test_what_a_run_derived_is_kept_under_its_name_of_today():
    derived = {"engine.dequantize": True, "training.recompute": "except_attention", "engine.kind": "vllm"}
    config = RunConfig()

    kept = keep_derived(config, {key: {"value": value, "reason": "its run"} for key, value in derived.items()})

    assert kept == ["engine.dense_copies=base", "training.recompute=full", "engine.kind=vllm"]
    assert (config.engine.dense_copies, config.training.recompute) == ("base", "full")
