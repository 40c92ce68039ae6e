"""`export` as a user calls it: a run's folder becomes one that transformers loads and that is proved, or nothing."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlbench.commands.export import export
from rlbench.commands.export_proof import Probe, plain_logprobs, policy_logprobs
from rlbench.config.schema import RunConfig
from rlbench.models.base import load_base
from rlbench.models.full_policy import FullPolicy
from rlbench.models.policy import Policy
from rlbench.records import Completion, Prompt, Rollout, RolloutGroup
from rlbench.tracking.jsonl import JsonlWriter
from rlbench.tracking.rollout_store import write_rollouts
from rlbench.training.checkpoint import save_checkpoint
from tests.models.test_lora import randomise

PROBE = Probe(prompts=((20, 21, 22), (30, 31)), completions=((40, 41, 42, 43), (50, 51, 1)), origin="a test")
NAME = "model.layers.1.mlp.down_proj.weight"


def make_config(model: Path, **changes) -> RunConfig:
    """Derived, of a run on a CPU."""
    config = RunConfig()
    config.name, config.model.path, config.model.dtype = "tiny", str(model), "float32"
    config.hardware.profile, config.engine.kind, config.training.num_steps = "cpu", "hf", 6
    config.optim.lr = 1e-4
    if changes.get("training__parameters") != "full":
        config.lora.rank, config.lora.alpha = 4, 8.0
    for key, value in changes.items():
        section, _, name = key.partition("__")
        setattr(getattr(config, section) if name else config, name or section, value)
    return config


def make_policy(config: RunConfig, scale: float = 1.0):
    dtype, quantization = getattr(torch, config.model.dtype), config.model.quantization
    base = load_base(str(config.model.path), dtype=dtype, device="cpu", quantization=quantization)
    if config.training.parameters == "full":
        policy = FullPolicy(base)
        with torch.no_grad():
            for index, master in enumerate(policy.parameters()):
                noise = torch.randn(master.shape, generator=torch.Generator().manual_seed(index))
                master.add_(noise * 0.02)
        policy._round_masters()
        return policy
    policy = Policy(base, config.lora, seed=0)
    randomise(policy.model)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.mul_(scale)
    return policy


def write_run(folder: Path, config: RunConfig, *, steps=(6,), scale: float = 1.0, state: dict | None = None):
    """What a run leaves that `export` reads; returns the policy."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    policy = make_policy(config, scale)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    for step in steps:
        saved = {
            "step": step,
            "adapter_fingerprint": policy.weights().fingerprint(),
            "evaluations": [],
            **(state or {}),
        }
        save_checkpoint(folder, policy, optimizer, saved, base_name=str(config.model.path), keep_last=9)
    metrics = JsonlWriter(folder / "metrics.jsonl")
    metrics.write(6, {"reward/mean": 0.5})
    metrics.write(6, {"eval/accuracy": 0.25, "eval/num": 8.0}, phase="eval")
    metrics.close()
    return policy


def record_rollouts(folder: Path, policy, step: int, shift: float = 0.0) -> None:
    """As if the policy had sampled them, with its logprobs moved by `shift` nats."""
    logprobs = policy_logprobs(policy, PROBE).tolist()
    groups = []
    for index, (prompt, tokens) in enumerate(zip(PROBE.prompts, PROBE.completions, strict=True)):
        own, logprobs = logprobs[: len(tokens)], logprobs[len(tokens) :]
        completion = Completion(
            token_ids=tokens, sampling_logprobs=tuple(p + shift for p in own), finish_reason="stop", seed=0,
            policy_version=step - 1, adapter_fingerprint=policy.weights().fingerprint(),
        )  # fmt: skip
        record = Prompt(prompt_id=f"train/{index}", text="", token_ids=prompt)
        rollout = Rollout(
            rollout_id=f"{step}/train/{index}/0", prompt=record, completion=completion, completion_text="",
            sample_index=0, components={}, reward=0.0,
        )  # fmt: skip
        groups.append(RolloutGroup(prompt=record, rollouts=(rollout,)))
    write_rollouts(folder, step, groups, {})


def record_of(folder: Path) -> dict:
    return json.loads((folder / "rlbench_export.json").read_text())


def gap_of(model, policy) -> float:
    return float((plain_logprobs(model, PROBE) - policy_logprobs(policy, PROBE)).abs().max())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def settings_of(run_folder: Path) -> dict:
    return yaml.safe_load((run_folder / "config.yaml").read_text())


@pytest.fixture(scope="module")
def lora_run(tiny_folder, tmp_path_factory):
    """The adapter that it started from is gone: it is not needed."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    policy = write_run(folder, make_config(tiny_folder), steps=(3, 6))
    record_rollouts(folder, policy, 7)
    saved = settings_of(folder)
    saved["lora"]["init_from"] = "gone"
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    return folder, policy


@pytest.fixture(scope="module")
def young_run(tiny_folder, tmp_path_factory):
    """Bfloat16, and an adapter far below half a step of most weights."""
    folder = tmp_path_factory.mktemp("young") / "run"
    write_run(folder, make_config(tiny_folder, model__dtype="bfloat16"), scale=1e-3)
    return folder


def test_a_merged_model_is_the_policy_and_carries_tokenizer_record_and_card(lora_run, tmp_path, capsys):
    run_folder, policy = lora_run
    dest = tmp_path / "new" / "merged"
    assert export([str(run_folder), str(dest)]) == 0
    out = capsys.readouterr().out

    model = AutoModelForCausalLM.from_pretrained(dest)
    assert model.dtype == torch.float32 and gap_of(model, policy) < 1e-4
    theirs = AutoTokenizer.from_pretrained(settings_of(run_folder)["model"]["path"])
    assert AutoTokenizer.from_pretrained(dest).chat_template == theirs.chat_template is not None
    found = record_of(dest)
    assert (found["step"], found["format"], found["dtype"], found["base"]) == (6, "merged", "float32", "trained")
    assert found["fingerprint"] == policy.weights().fingerprint()
    assert found["proof"]["num_tokens"] == 7 and found["proof"]["tokens"] == "rollouts sampled after step 6"
    assert found["proof"]["policy_gap_nats"]["max"] < 1e-4 < 0.1 < found["proof"]["training_moved_nats"]["mean"]
    assert found["proof"]["recorded_gap_nats"]["max"] < 1e-4
    assert found["survived_share"] == pytest.approx(1, abs=1e-5)
    assert "training moved them by" in out and f"written: {dest}" in out and "warning" not in out
    card = (dest / "README.md").read_text()
    assert "after 6 of 6 steps" in card and "25.0%, 8 held-out problems" in card and "rank 4, alpha 8" in card
    assert [f for f in dest.parent.iterdir()] == [dest]


def test_an_adapter_is_the_policys_and_loads_with_its_base_and_tokenizer(lora_run, tmp_path):
    run_folder, policy = lora_run
    assert export([str(run_folder), str(tmp_path / "out"), "--format", "adapter", "--step", "3"]) == 0

    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert gap_of(model, policy) < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<eos>"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_absolute()
    assert record_of(tmp_path / "out")["step"] == 3 and record_of(tmp_path / "out")["base"] is None
    assert "AutoPeftModelForCausalLM" in (tmp_path / "out" / "README.md").read_text()


def test_nearest_rounding_that_loses_the_change_is_warned_of_and_stochastic_rounding_keeps_it(
    young_run, tmp_path, capsys
):
    outs = {}
    calls = {"nearest": ["--rounding", "nearest"], "first": ["--rounding", "stochastic"], "again": []}
    for name, options in calls.items():
        assert export([str(young_run), str(tmp_path / name), *options]) == 0
        outs[name] = capsys.readouterr().out
    found = {name: record_of(tmp_path / name) for name in outs}

    assert found["nearest"]["survived_share"] < 0.5
    assert "of what was trained is lost" in outs["nearest"] and "--rounding stochastic" in outs["nearest"]
    assert found["first"]["survived_share"] == pytest.approx(1, abs=0.1) and "is lost" not in outs["first"]
    assert found["first"]["relative_error"] > 1
    assert weights_of(tmp_path / "first")[NAME].dtype == torch.bfloat16
    first, again, nearest = (weights_of(tmp_path / name) for name in ("first", "again", "nearest"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first[NAME], nearest[NAME])
    assert AutoConfig.from_pretrained(tmp_path / "first").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_tied_head_stays_tied(tiny_folder, tmp_path, dtype):
    shutil.copytree(tiny_folder, tmp_path / "tied")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    policy = write_run(tmp_path / "run", make_config(tmp_path / "tied", lora__rslora=True))

    assert export([str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", dtype]) == 0

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert "lm_head.weight" not in weights_of(tmp_path / "out")
    assert gap_of(merged.float(), policy) < (1e-4 if dtype == "float32" else 0.2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("own", ["bfloat16", "float32"])
def test_of_all_weights_the_masters_are_written_in_the_dtype_asked_for(tiny_folder, tmp_path, own, dtype):
    config = make_config(tiny_folder, training__parameters="full", model__dtype=own)
    policy = write_run(tmp_path / "run", config)

    assert export([str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", dtype]) == 0

    written = weights_of(tmp_path / "out")
    assert len(written) == 21
    for name, master in policy.named_parameters():
        assert torch.equal(written[name], master.detach().to(getattr(torch, dtype))), name
    found = record_of(tmp_path / "out")
    assert found["fingerprint"] == policy.weights().fingerprint()
    assert found["proof"]["training_moved_nats"]["mean"] > 0.01
    assert (found["proof"]["policy_gap_nats"]["max"] < 1e-3) == (own == dtype)
    assert found["rounding"] is found["survived_share"] is None


def test_the_fingerprint_of_all_weights_is_compared_with_the_recorded_one_unless_an_older_rlbench_took_it(
    tiny_folder, tmp_path
):
    config = make_config(tiny_folder, training__parameters="full")
    own = make_policy(config).weights().fingerprint()
    for name, recorded in (("run", own), ("other", 20 * "a"), ("older", 16 * "a")):
        write_run(tmp_path / name, config, state={"adapter_fingerprint": recorded})

    for name, is_compared in (("run", True), ("older", False)):
        assert export([str(tmp_path / name), str(tmp_path / f"{name} out")]) == 0
        assert record_of(tmp_path / f"{name} out")["fingerprint"] == own
        assert record_of(tmp_path / f"{name} out")["fingerprint_is_compared"] is is_compared
    with pytest.raises(ValueError, match=f"but its state says {20 * 'a'}"):
        export([str(tmp_path / "other"), str(tmp_path / "other out")])


def test_a_fingerprint_that_nothing_can_be_compared_with_says_so(tiny_folder, tmp_path, capsys):
    config = make_config(tiny_folder, training__parameters="full")
    policy = write_run(tmp_path / "run", config)
    policy.save(tmp_path / "run", "")
    shutil.rmtree(tmp_path / "run" / "checkpoints")

    assert export([str(tmp_path / "run"), str(tmp_path / "out")]) == 0

    found = record_of(tmp_path / "out")
    assert found["fingerprint"] == policy.weights().fingerprint()
    assert found["fingerprint_is_compared"] is False
    assert f"fingerprint: {found['fingerprint']}, not compared" in capsys.readouterr().out
    assert f"{found['fingerprint']} (not compared" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("quantization", ["nf4", "fp8"])
def test_a_quantised_base_is_written_as_it_was_trained_on_or_as_it_was(tiny_folder, tmp_path, quantization, capsys):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    config = make_config(tiny_folder, model__dtype="bfloat16", model__quantization=quantization)
    policy = write_run(tmp_path / "run", config)
    adapter = policy.adapter()
    layer = NAME.removesuffix(".weight")
    change = adapter.scaling * adapter.lora_b[layer] @ adapter.lora_a[layer]
    quantised = policy._tree.get_submodule(layer).get_base_layer().dense_weight().float()
    disk = load_file(tiny_folder / "model.safetensors")[NAME]

    for base, weight in (("trained", quantised), ("original", disk)):
        dest = tmp_path / base
        options = [] if base == "trained" else ["--base", base]
        assert export([str(tmp_path / "run"), str(dest), "--dtype", "float32", *options]) == 0
        torch.testing.assert_close(weights_of(dest)[NAME], weight + change, rtol=1e-6, atol=1e-6)
        found, out = record_of(dest), capsys.readouterr().out
        assert found["base"] == base and AutoModelForCausalLM.from_pretrained(dest).dtype == torch.float32
        if base == "trained":
            assert found["proof"]["policy_gap_nats"]["max"] < 1e-4
            assert f"the {quantization} weights that were trained on" in out and "--base original" in out
        else:
            assert found["proof"]["policy_gap_nats"]["max"] > 1e-3 > found["proof"]["folder_gap_nats"]["max"]
            assert found["proof"]["original_base_gap_nats"]["mean"] > 1e-3
            assert "no policy that was ever sampled" in out
