"""A run whose engine samples from other weights stops within the step, with exit status 6 and one sentence.

All faults, against both engines: tests/checks/test_faults.py.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from rlbench.tracking.jsonl import read_metrics
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
