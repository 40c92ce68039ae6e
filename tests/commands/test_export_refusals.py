"""What `export` refuses, in one sentence and with nothing left behind; and the run that it is made for, whole."""

import json
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlbench.commands import export_weights
from rlbench.commands.export import export
from rlbench.config.schema import RunConfig
from rlbench.tracking.errors import TrackingError
from tests.commands.test_export import make_config, record_of, record_rollouts, settings_of, write_run
from tests.loops.conftest import end_of_the_fork_server, run, run_afresh, tiny_overrides  # noqa: F401 (fixtures)
from tests.tiny import save_tiny_model


def evaluated(accuracy: dict[int, float]) -> dict:
    return {"evaluations": [{"step": step, "metrics": {"eval/accuracy": value}} for step, value in accuracy.items()]}


@pytest.fixture(scope="module")
def lora_run(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    config = make_config(tiny_folder, checkpoint__keep_best="eval/accuracy", evaluation__every_steps=3)
    evaluations = [
        {"step": step, "metrics": {"eval/accuracy": value}} for step, value in ((0, 0.1), (3, 0.5), (6, 0.2))
    ]
    policy = write_run(folder, config, steps=(3, 6), state={"evaluations": evaluations})
    record_rollouts(folder, policy, 7)
    return folder


def refused(arguments, match: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=match) as found:
        export([str(argument) for argument in arguments])
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["RUN"], "export needs the folder of a run and a new folder; expected: python -m rlbench export RUN DEST"),
        (["RUN", "model.path=x"], "export needs the folder of a run and a new folder"),
        (["nowhere", "DEST"], "there is no folder nowhere"),
        (["RUN", "RUN"], "which is there and not empty; expected a folder that is new or empty"),
        (["RUN", "RUN/config.yaml"], "which is there and not empty"),
        (["RUN", "DEST", "--step", "x"], "--step is x, expected one of: 3, 6, last, best"),
        (["RUN", "DEST", "--step", "5"], "--step is 5, of which no checkpoint was kept in .*: 3, 6, last, best"),
        (["RUN", "DEST", "--steps", "5"], "export has no option --steps; expected: "),
        (["RUN", "DEST", "--dtype"], "expected one argument; expected: "),
        (["RUN", "DEST", "--dtype", "float16"], "--dtype is 'float16', expected one of: bfloat16, float32"),
        (["RUN", "DEST", "--format", "merge"], "did you mean merged"),
        (["RUN", "DEST", "--rounding", "up"], "--rounding is 'up', expected one of: nearest, stochastic"),
        (["RUN", "DEST", "--rounding", "stochastic"], "but float32 is written, which takes the sums as they are"),
        (["RUN", "DEST", "--base", "own"], "--base is 'own', expected one of: trained, original"),
        (["RUN", "DEST", "--format", "adapter", "--dtype", "bfloat16"], "--dtype is bfloat16, but an adapter is"),
        (["RUN", "DEST", "--format", "adapter", "--base", "original"], "--base is original, but an adapter is"),
        (["RUN", "DEST", "lora.rank=8"], "lora.rank=8 is not read; expected none but model.path and model.cache_dir"),
        (["RUN", "DEST", "model.path=gone"], "model.path is gone, but there is no such folder"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_leaves_nothing(lora_run, tmp_path, arguments, sentence):
    places = {"RUN": str(lora_run), "DEST": str(tmp_path / "out")}
    refused([places.get(a, a.replace("RUN/", f"{lora_run}/")) for a in arguments], sentence)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({"training__parameters": "full"}, ["--format", "adapter"], "the run trained all weights; expected --format"),
        ({"training__parameters": "full"}, ["--base", "trained"], "there is no base beside them.*expected no --base"),
        ({"training__parameters": "full"}, ["--rounding", "stochastic"], "expected no --rounding"),
        ({"stage": "reward_model"}, [], "run of stage=reward_model.*no language model"),
        ({}, ["--step", "best"], "checkpoint.keep_best is null, .* as one of: none, the run made no evaluation"),
        ({}, ["--step", "7"], "holds no checkpoints; expected --step last"),
        ({}, [], "holds neither checkpoints nor adapter/"),
    ],
)  # fmt: skip
def test_a_run_that_has_no_such_thing_says_so(tiny_folder, tmp_path, changes, options, sentence):
    config = make_config(tiny_folder, **changes)
    if config.stage == "reward_model":
        config.engine.kind = RunConfig().engine.kind  # it has none
    write_run(tmp_path / "run", config)
    if "checkpoints" in sentence:
        shutil.rmtree(tmp_path / "run" / "checkpoints")

    refused([tmp_path / "run", tmp_path / "out", *options], sentence)
    assert [f.name for f in tmp_path.iterdir()] == ["run"]


def test_a_chain_names_its_stages(lora_run, tmp_path):
    shutil.copytree(lora_run, tmp_path / "chain" / "1_sft")
    (tmp_path / "chain" / "chain.json").write_text("{}")

    refused(
        [tmp_path / "chain", tmp_path / "out"],
        "is a chain of runs; expected the folder of one of its stages: .*/chain/1_sft$",
    )


def test_the_best_step_is_that_of_keep_best_and_one_before_training_is_refused(lora_run, tmp_path):
    assert export([str(lora_run), str(tmp_path / "out"), "--step", "best"]) == 0
    assert record_of(tmp_path / "out")["step"] == 3

    config = make_config(lora_model(lora_run), checkpoint__keep_best="eval/accuracy", evaluation__every_steps=3)
    write_run(tmp_path / "run", config, state=evaluated({0: 0.5, 6: 0.2}))
    refused(
        [tmp_path / "run", tmp_path / "new", "--step", "best"],
        r"best eval/accuracy was that before the first step \(0.5\)",
    )


def lora_model(run_folder: Path) -> Path:
    return Path(settings_of(run_folder)["model"]["path"])


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_refused_by_name(lora_run, tmp_path, capsys):
    shutil.copytree(lora_run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-000006" / "adapter" / "adapter_model.safetensors"
    os.truncate(file, 1000)

    refused([tmp_path / "run", tmp_path / "out", "--step", "6"], "is damaged: adapter/adapter_model.safetensors")
    assert export([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert record_of(tmp_path / "out")["step"] == 3
    out = capsys.readouterr().out
    assert "warning: " in out and "step-000006 is damaged: " in out and "; an older checkpoint is taken\n" in out


@pytest.mark.parametrize("change", ["scaling", "a written matrix", "a matrix lost", "nan"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_that_is_not_the_policy_is_an_error_in_any_dtype(lora_run, tmp_path, monkeypatch, dtype, change):
    merge, save = export_weights.merge_, export_weights._save_model

    def wrong_merge(base, adapter, rounding):
        merge(base, adapter, rounding)
        with torch.no_grad():
            base.model.layers[1].mlp.up_proj.weight.mul_(float("nan") if change == "nan" else 1.01)

    def wrong_save(base, folder, dtype):
        save(base, folder, dtype)
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.self_attn.v_proj.weight"
        tensors[name] = tensors[name] * 1.01
        if change == "a matrix lost":
            del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    is_merge = change in ("scaling", "nan")
    monkeypatch.setattr(export_weights, *(("merge_", wrong_merge) if is_merge else ("_save_model", wrong_save)))

    sentence = "the merged weights do not compute" if is_merge else "the folder that was written does not compute"
    refused([lora_run, tmp_path / "out", "--dtype", dtype], f"the proof failed: {sentence}.*nothing was exported")
    assert not any(tmp_path.iterdir())


def test_another_base_than_the_one_trained_on_is_found_by_what_the_run_recorded(lora_run, tmp_path):
    other = save_tiny_model(tmp_path / "other", seed=5)

    refused(
        [lora_run, tmp_path / "out", f"model.path={other}"],
        "base and adapter that were read give the rollouts sampled after step 6 other logprobs than the run recorded",
    )
    moved = shutil.copytree(settings_of(lora_run)["model"]["path"], tmp_path / "moved")
    assert export([str(lora_run), str(tmp_path / "out"), f"model.path={moved}"]) == 0


def test_an_adapter_with_other_settings_than_the_config_is_refused(lora_run, tmp_path):
    shutil.copytree(lora_run, tmp_path / "run")
    saved = settings_of(tmp_path / "run")
    saved["lora"]["alpha"] = 16.0
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(saved))

    refused([tmp_path / "run", tmp_path / "out"], "holds weights with fingerprint .*, but its state says ")


def test_where_these_weights_sampled_nothing_rollouts_of_the_nearest_step_prove_it(lora_run, tmp_path):
    shutil.copytree(lora_run, tmp_path / "run")
    rollouts = tmp_path / "run" / "rollouts"
    os.rename(rollouts / "step-000007.parquet", rollouts / "step-000009.parquet")
    (rollouts / "step-abc.parquet").write_text("notes")

    assert export([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    proof = record_of(tmp_path / "out")["proof"]
    assert proof["tokens"] == "rollouts of step 9" and proof["num_tokens"] == 7 and proof["recorded_gap_nats"] is None


def test_without_checkpoints_the_result_is_exported_with_a_warning_and_fixed_texts_prove_it(lora_run, tmp_path, capsys):
    shutil.copytree(lora_run, tmp_path / "run")
    shutil.copytree(lora_run / "checkpoints" / "step-000006" / "adapter", tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run" / "rollouts")

    assert export([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    found = record_of(tmp_path / "out")
    assert found["step"] == 6 and found["proof"]["tokens"] == "fixed texts" and found["proof"]["num_tokens"] > 100
    assert found["proof"]["recorded_gap_nats"] is None
    assert "warning: no checkpoint is there" in capsys.readouterr().out


@contextmanager
def files_of_at_most(num_bytes: int):
    """Stands for a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("part", "num_bytes"), [("_save_model", 100), ("_save_model", 2_000), ("_save_tokenizer", 1_000)]
)
def test_a_disk_that_takes_no_more_is_one_sentence_and_leaves_nothing(lora_run, tmp_path, monkeypatch, part, num_bytes):
    """Config, weights and tokenizer are written by three libraries, each with an error of its own."""
    save = getattr(export_weights, part)

    def full(*arguments):
        with files_of_at_most(num_bytes):
            save(*arguments)

    monkeypatch.setattr(export_weights, part, full)
    (tmp_path / "out").mkdir()

    for dest in (tmp_path / "out", tmp_path / "new" / "folders"):
        refused([lora_run, dest], f"cannot export to {dest}: .*File too large", TrackingError)
        assert [f.name for f in tmp_path.iterdir()] == ["out"] and not any((tmp_path / "out").iterdir())


def test_a_whole_run_is_exported_and_transformers_generates_what_it_learned(tiny_overrides, tmp_path):  # noqa: F811
    steps = ["training.num_steps=12", "optim.schedule=constant", "hydra.run.dir=run"]
    trained = run("+exp=grpo_gsm8k", *tiny_overrides, *steps, folder=tmp_path)
    assert trained.returncode == 0, trained.stdout + trained.stderr

    done = run_afresh("export", "run", "merged", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "answers of the evaluation after step 12" in done.stdout
        and "the policy against its run's record" in done.stdout
    )
    proof = json.loads((tmp_path / "merged" / "rlbench_export.json").read_text())["proof"]
    assert proof["policy_gap_nats"]["max"] < 1e-4 and proof["recorded_gap_nats"]["max"] < 1e-3

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    messages = [{"role": "user", "content": "3+4"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(found[0, inputs["input_ids"].shape[1] :]).count("a") > 6

    again = run_afresh("export", "run", "merged", folder=tmp_path)
    errors = [line for line in again.stderr.splitlines() if line.startswith("error: ")]
    assert again.returncode == 2 and len(errors) == 1 and "Traceback" not in again.stderr
    assert "DEST is merged, which is there and not empty" in errors[0]
