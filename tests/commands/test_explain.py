"""Where each value comes from, checked against the files themselves; what a user reads of it."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlbench.build import prepare
from rlbench.commands.explain import explain, explained_runs
from rlbench.config.compose import config_folder, group_choices, schema_keys, to_run_config
from rlbench.config.derive import HardwareFacts
from rlbench.config.key_docs import key_doc
from rlbench.config.sources import UNDECLARED, compose_with_layers, settings
from rlbench.models import device
from tests.loops.conftest import ENVIRONMENT

NO_GPU = HardwareFacts(
    device="cpu",
    device_name="no GPU",
    num_cores=3,
    memory_gib=8.0,
    matmul_gflops={"bfloat16": 100.0, "float32": 50.0},
    vllm_problem="none is installed",
)
GPU = {"device": "cuda", "device_name": "a GPU", "memory_gib": 80.0}


@pytest.fixture(autouse=True)
def facts(monkeypatch):
    """Nothing is measured."""
    monkeypatch.setattr(device, "hardware_facts", lambda profile, cap: NO_GPU)


def by_key(*overrides: str) -> dict:
    (run,) = explained_runs(overrides)[1]
    return {setting.key: setting for setting in run.settings}


@pytest.mark.parametrize("name", group_choices("exp"))
def test_the_file_that_is_named_holds_the_value(name):
    composed, layers = compose_with_layers([f"+exp={name}", "seed=7"])
    found = settings(to_run_config(composed), layers)
    from_files = 0
    for setting in found:
        if not setting.layers:
            assert setting.value == setting.default, setting
            continue
        winner = setting.layers[-1]
        if winner.startswith("command line: "):
            assert winner == "command line: seed=7" and setting.key == "seed"
            continue
        group, _, file = winner.removeprefix("conf/").rpartition("/")
        held = OmegaConf.to_container(OmegaConf.load(config_folder() / group / file), resolve=False)
        inside = setting.key if group in ("exp", "") else setting.key.removeprefix(f"{group}.")
        for part in inside.split("."):
            held = held[part]
        if isinstance(held, str) and held.startswith("${"):
            held = OmegaConf.select(composed, held[2:-1])
        from_files += 1
        if setting.key != "chain":
            assert setting.value == held, setting
    assert from_files > 10


def test_each_kind_of_origin_is_named():
    found = by_key("+exp=ppo_gsm8k", "optim.beta2=0.95", "algorithm.critic.warmup_steps=3")

    assert found["optim.beta1"].layers == () and not found["optim.beta1"].is_changed
    assert found["data.answer_remove"].layers == ("conf/data/gsm8k.yaml",) and found["data.answer_remove"].is_changed
    assert found["algorithm.advantage"].layers == ("conf/algorithm/ppo.yaml",)
    assert found["optim.lr"].layers == ("conf/exp/ppo_gsm8k.yaml",)
    assert found["optim.beta2"].layers == ("command line: optim.beta2=0.95",)
    over = ("conf/exp/ppo_gsm8k.yaml", "command line: algorithm.critic.warmup_steps=3")
    assert found["algorithm.critic.warmup_steps"].layers == over
    threads = found["hardware.num_threads"]
    assert (threads.value, threads.reason) == (3, "3 cores are open to this process") and threads.is_changed
    assert found["model.dtype"].reason.startswith("measured: 100 GFLOP/s in bfloat16")
    assert found["checks.drift_warn_nats"].reason.startswith("2.5 times the mean gap")


def test_who_chose_a_group_is_known():
    layers, _ = explained_runs(["+exp=ppo_gsm8k", "rewards=math_boxed"])
    chosen = {layer.name: layer.chosen_by for layer in layers}

    assert chosen["conf/algorithm/ppo.yaml"] == "conf/exp/ppo_gsm8k.yaml"
    assert chosen["conf/rewards/math_boxed.yaml"] == "the command line" and chosen["conf/data/gsm8k.yaml"] == ""


def test_what_is_added_and_removed_on_the_command_line_is_its_own():
    added = "+rewards.components.short={path: rlbench_rewards.answer_format.AnswerFormat, kwargs: {tag: 3}}"
    found = by_key("~rewards.components.format", added)

    assert found["rewards.components.short.path"].layers == (f"command line: {added}",)
    assert found["rewards.components.short.kwargs.tag"].default is UNDECLARED
    assert found["rewards.components.short.weight"].layers == () and found["rewards.components.short.weight"].value == 1
    assert not any(key.startswith("rewards.components.format") for key in found)
    emptied = by_key("stage=sft", "algorithm=none", "~rewards.components.format", "~rewards.components.accuracy")
    assert emptied["rewards.components"].layers[-1] == "command line: ~rewards.components.accuracy"


def test_a_stage_of_a_chain_has_its_own_overrides_and_the_defaults_of_what_it_does_not_read():
    change = 'chain.1.overrides=["stage=rl","algorithm=rloo","optim.lr=3e-4"]'
    _, runs = explained_runs(["+exp=chain_gsm8k", change])
    sft, rloo, dpo = ({s.key: s for s in run.settings} for run in runs)

    assert [run.stage for run in runs] == ["sft", "rl", "preference"]
    assert sft["optim.lr"].layers == ("chain.0.overrides: optim.lr=2e-4",) and sft["optim.lr"].value == 2e-4
    assert sft["rewards.components"].layers == () and sft["rewards.components"].value == {}
    assert sft["algorithm.loss"].layers == ()
    assert rloo["algorithm.loss"].layers == ("conf/algorithm/rloo.yaml, by chain.1.overrides: algorithm=rloo",)
    assert rloo["rewards.components.accuracy.path"].layers == ("conf/rewards/math.yaml",)
    assert dpo["lora.init_from"].value == "2_grpo" and "the chain sets it" in dpo["lora.init_from"].reason
    assert (dpo["preference.reference"].value, sft["lora.init_from"].value) == ("start", None)


def test_a_resumed_run_keeps_what_it_derived(tmp_path):
    kept = {
        "hardware.num_threads": {"value": 9, "reason": "9 cores"},
        "training.num_steps": {"value": 77, "reason": "a"},
    }
    (tmp_path / "derived.json").write_text(json.dumps(kept))
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    for place in (tmp_path, tmp_path / "checkpoints" / "step-000001"):
        found = by_key(f"resume={place}")
        steps = found["training.num_steps"]
        assert (steps.value, steps.reason) == (77, "kept from the run that is resumed: a")
        assert found["hardware.num_threads"].value == 3


def test_changed_values_come_first_and_can_be_shown_alone(capsys):
    assert explain(["+exp=grpo_gsm8k", "optim.weight_decay=0.1", "optim"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("  * ")] == ["optim.lr", "optim.weight_decay"]
    assert lines[1].startswith("  * ") and lines[2].startswith("  * ")
    keys = [key for key in schema_keys() if key.startswith("optim.") and key != "optim.galore"]
    assert sorted(line[4:].split()[0] for line in lines[1:]) == sorted(keys)
    assert "0.1  (command line: optim.weight_decay=0.1; default 0.0)" in lines[2]
    assert "2  (conf/exp/grpo_gsm8k.yaml, as by default)" in next(x for x in lines if "warmup_steps" in x)

    assert explain(["+exp=grpo_gsm8k", "--changed"]) == 0
    text = capsys.readouterr().out
    assert "optim.lr" in text and "optim.beta1" not in text and "composed of conf/hardware/auto.yaml" in text


def test_the_learning_rate_of_all_weights_is_derived_and_that_of_an_experiment_is_named(capsys):
    every = ["+exp=grpo_gsm8k", "training.parameters=full", "optim.lr"]
    assert explain([*every, "optim.lr=null"]) == 0
    shown = capsys.readouterr().out
    assert "1e-06" in shown and "the default of TRL's GRPOConfig" in shown and "warning" not in shown

    assert explain(every) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "0.0003" in shown and "optim.lr is 300 times 1e-06, which optim.lr=null would take" in shown


def test_a_key_that_is_named_shows_the_comment_beside_it(capsys):
    assert explain(["+exp=dapo_gsm8k", "algorithm.clip_ratio_high"]) == 0
    text = capsys.readouterr().out
    assert "distance above 1; larger than the lower one: DAPO's clip-higher" in text
    assert "0.28" in text and "conf/algorithm/dapo.yaml" in text and "rlbench/config/algorithm.py:" in text

    assert explain(["+exp=ppo_gsm8k", "algorithm.critic.lr=1", "algorithm.critic.lr"]) == 0
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()[1:]]
    assert ["from", "command line: algorithm.critic.lr=1"] in lines and ["over", "conf/exp/ppo_gsm8k.yaml"] in lines


def test_a_place_is_the_line_of_the_field():
    file, _, line = key_doc("checkpoint.keep_best").place.partition(":")
    source = (config_folder().parent / file).read_text().splitlines()

    assert source[int(line) - 1].strip().startswith("keep_best: str | None")
    assert key_doc("checkpoint.keep_best").meaning.startswith("a number of the evaluations, such as eval/accuracy")
    assert key_doc("rewards.components.any.weight").meaning == "0: only watched"


def test_every_key_has_a_meaning():
    sections = {key.rpartition(".")[0] for key in schema_keys()}
    assert [key for key in schema_keys() if key not in sections and not key_doc(key).meaning] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lrr"], "there is no key 'optim.lrr'; nearest valid keys: optim.lr"),
        (["optm"], "nearest valid keys: optim"),
        (["--all"], "explain has no option --all; expected: python -m rlbench explain"),
        (["--seed=3"], "--seed=3 is no option: settings are written without dashes, seed=3"),
        (["optim.lr=-1"], "optim.lr is -1.0, expected more than 0"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        explain(arguments)


def test_what_cannot_run_here_is_shown_with_the_reason(capsys, monkeypatch):
    assert explain(["hardware=gpu", "hardware.profile", "optim.lr=2"]) == 2
    shown = capsys.readouterr()
    assert "gpu" in shown.out and shown.err.startswith("error: hardware.profile is gpu, but torch sees no CUDA device")

    monkeypatch.setattr(device, "hardware_facts", lambda profile, cap: replace(NO_GPU, **GPU))
    monkeypatch.setattr("rlbench.models.source.hub_problem", lambda: "offline")
    found = by_key("model.path=nobody/nothing")
    assert found["hardware.profile"].value == "gpu" and found["engine.max_num_seqs"].value == 256
    recompute = found["training.recompute"]
    assert recompute.value == "auto" and "needs the model's config.json, which cannot be had here" in recompute.reason


def test_on_a_gpu_recomputation_is_chosen_from_the_models_config_alone(monkeypatch, tiny_folder):
    monkeypatch.setattr(device, "hardware_facts", lambda profile, cap: replace(NO_GPU, **GPU))
    recompute = by_key(f"model.path={tiny_folder}")["training.recompute"]

    assert recompute.value == "none" and recompute.reason.startswith("8192 tokens keep 0.0 GiB of activations, ")


def edited_model(folder: Path, source: Path, **changes) -> Path:
    """`source` without its weights, with another config.json."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True}  # fmt: skip
PLAIN = ["data.system_prompt=null", "data.examples=[]", "data.prompt_template='{prompt}'", "data.answer_remove=null",
         "rewards=math"]  # fmt: skip


def on_a_gpu(monkeypatch) -> None:
    found = replace(NO_GPU, **GPU, vllm_problem="")
    monkeypatch.setattr(device, "hardware_facts", lambda profile, cap: found)


def test_the_kv_cache_is_what_the_run_will_take(monkeypatch, tiny_folder, tmp_path):
    on_a_gpu(monkeypatch)
    model = edited_model(tmp_path / "model", tiny_folder, **SMOLLM2)
    rows = tmp_path / "rows.jsonl"  # a token a character; <user>, a line's end and <assistant> are 18
    rows.write_text("".join(json.dumps({"question": "q" * n, "answer": "7"}) + "\n" for n in (40, 82, 61, 5, 9)))
    overrides = [f"model.path={model}", f"data.path={rows}", *PLAIN, "sampling.max_tokens=150"]
    found = by_key(*overrides)

    # 18 + 82 + 150 tokens; 256 sequences of 16 blocks and one block more, of 16 tokens of 2 x 30 x 192 numbers of 2
    # bytes: 1.41 GiB, to the next tenth; the card's 40% would be 32
    cache = found["engine.kv_cache_gib"]
    assert (cache.value, cache.reason) == (1.5, "256 sequences of 250 tokens fill no more")

    config = to_run_config(compose_with_layers(overrides)[0])
    derived = {d.key: (d.value, d.reason) for d in prepare(config).derived}
    assert derived["engine.kv_cache_gib"] == (cache.value, cache.reason) and config.engine.kv_cache_gib == 1.5
    assert {key: (found[key].value, found[key].reason) for key in derived} == derived


def test_a_dense_base_has_room_beside_the_cache_that_the_run_takes(monkeypatch, tiny_folder, tmp_path):
    found = replace(NO_GPU, **GPU | {"memory_gib": 24.0}, vllm_problem="")
    monkeypatch.setattr(device, "hardware_facts", lambda profile, cap: found)
    llama_8b = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}  # fmt: skip
    model = edited_model(tmp_path / "model", tiny_folder, **llama_8b)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q", "answer": "7"}\n' * 5)
    overrides = [f"model.path={model}", f"data.path={rows}", *PLAIN, "engine.max_num_seqs=8", "sampling.max_tokens=13"]
    dense = by_key(*overrides, "model.quantization=nf4")["engine.dense_copies"]

    # 0.9 of 24, less 5.31 of the base, 0.70 of the adapter, 3 of reserves: 12.6, less 0.1 of 17 blocks of 2 MiB
    assert (
        dense.reason == "take 13.0 GiB while it generates, 12.5 GiB are left beside base and 0.1 GiB of keys and values"
    )


def test_rows_and_tokenizers_that_the_run_could_not_use_are_named(monkeypatch, tiny_folder, tmp_path, capsys):
    on_a_gpu(monkeypatch)
    model = edited_model(tmp_path / "model", tiny_folder, **SMOLLM2)
    assert explain([f"model.path={model}", "data.path=nothing.jsonl", *PLAIN, "engine.kv_cache_gib"]) == 2
    assert "error: data.path is nothing.jsonl, but there is no such file" in capsys.readouterr().err

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q", "answer": "7"}\n' * 5)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    assert explain([f"model.path={model}", f"data.path={rows}", *PLAIN, "engine.kv_cache_gib"]) == 2
    assert f"error: model.path: {model} has no tokenizer that can be read" in capsys.readouterr().err


def test_a_run_to_resume_that_is_not_looked_up_is_said(capsys):
    assert explain(["+exp=grpo_gsm8k", "resume=auto", "training.num_steps"]) == 0
    assert "resume=auto: what that run derived when it began is not known here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lrr=1"], "error: there is no key 'optim.lrr'; nearest valid keys: optim.lr"),
        (["optim.lr=1,2"], "error: optim.lr has several values (1,2)"),
        (["+exp=grpo_gsm"], "did you mean grpo_gsm8k?"),
        (["optim.lr=-1"], "error: optim.lr is -1.0, expected more than 0"),
        (["+exp=chain_gsm8k", "optim.lr=1"], "error: stage 'sft' (chain.0): optim.lr is set on the command line"),
    ],
)
def test_settings_that_do_not_compose_are_one_sentence_on_the_command_line(arguments, message, tmp_path):
    command = [sys.executable, "-m", "rlbench", "explain", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)

    assert done.returncode == 2 and done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in done.stderr, done.stderr
    assert not [*tmp_path.iterdir()]


def test_what_it_derives_does_not_wait_for_peft():
    code = "import sys, rlbench.models.memory; sys.exit('peft' in sys.modules or 'transformers' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=False).returncode == 0
