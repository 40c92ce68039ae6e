"""Faults of a whole run, injected: each ends as promised.

fault -> promise -> test, in this folder where no other is named
kill -9 -> continues bit for bit -> test_rl_runs.py, test_sft_runs.py, test_chain_runs.py, scripts/soak_kills.py
SIGTERM, Ctrl-C -> the step ends, is saved, status 143 or 130; a second one ends at once -> test_rl_runs.py
disk full -> old checkpoint intact, one sentence, status 4; checkpoint.on_error=go_on: a warning -> here, and
    tests/training/test_checkpoint.py
damaged checkpoint -> named, the one before is taken; any changed byte is noticed -> tests/training/test_checkpoint.py
no finite gradient -> skipped, batch kept, status 3 after training.max_bad_steps -> here
out of memory in an update -> half the microbatch, same gradient -> here, tests/training/test_microbatch_budget.py
reward hangs, breaks, dies -> no reward, never 0; worker replaced -> tests/rewards/test_pool.py, test_pool_policies.py
wandb unreachable -> off with one line, metrics.jsonl goes on -> tests/tracking/test_wandb_tracker.py
engine with other weights -> status 6 within the step -> here; all of them: tests/checks/test_faults.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlbench.tracking.jsonl import read_metrics
from rlbench.tracking.rollout_store import read_rollouts
from rlbench.training.checkpoint import find_checkpoint
from tests.loops.conftest import ENVIRONMENT, run

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

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body), *overrides],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=290,
    )  # fmt: skip

    assert done.returncode == 6, done.stdout + done.stderr
    assert message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl", "train")] == [1, 2]


def test_a_drift_beyond_the_limit_stops_the_run(tiny_overrides, tmp_path):
    done = run(*tiny_overrides, "training.num_steps=3", "evaluation.num_prompts=0", "checks.drift_stop_nats=1e-9",
               folder=tmp_path)  # fmt: skip

    assert done.returncode == 6, done.stdout + done.stderr
    assert "more than checks.drift_stop_nats of 1e-09" in " ".join(done.stderr.split())


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
    "out of memory": """
import torch, rlbench.training.step as step
real, calls = step._backward, []
def backward(*rest):
    calls.append(1)
    if len(calls) == 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return real(*rest)
step._backward = backward
""",
}


def run_with(fault: str, overrides: list[str], folder: Path) -> subprocess.CompletedProcess:
    program = INJECTED[fault] + "import sys\nfrom rlbench.__main__ import main\nsys.argv[0] = 'rlbench'\nmain()"
    return subprocess.run(
        [sys.executable, "-c", program, *overrides, "evaluation.num_prompts=0"],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=290,
    )  # fmt: skip


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


def test_out_of_memory_halves_the_microbatch_for_the_rest_of_the_run(tiny_overrides, tmp_path):
    done = run_with("out of memory", [*tiny_overrides, "training.num_steps=4", "hydra.run.dir=run"], tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "out of memory in the update" in " ".join((done.stdout + done.stderr).split())
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl", "train"))
    sizes = [line["training/tokens_per_microbatch"] for line in lines if "training/tokens_per_microbatch" in line]
    assert len(set(sizes[1:])) == 1 and sizes[-1] < 4096
    assert find_checkpoint(tmp_path / "run")[0].state["tokens_per_microbatch"] == sizes[-1]
