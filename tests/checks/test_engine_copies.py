"""Where all weights are trained: what an engine with a copy of its own can hold instead of them, named."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlbench.checks.limits import FLOORS
from rlbench.checks.policy_identity import PolicyIdentity, PolicyIdentityError
from rlbench.engine.hf_engine import HfEngine
from rlbench.models.full_policy import FullPolicy
from rlbench.records import Prompt, SamplingParams
from rlbench.weight_sync import sync

NAME = "model.layers.1.mlp.up_proj.weight"
SAMPLING = SamplingParams(max_tokens=5)
PROMPTS = [Prompt(prompt_id="0", text="", token_ids=(5, 6, 7))]


@pytest.fixture
def run(tiny_base):
    """An engine with weights of its own, synced with version 1."""
    policy, engine = FullPolicy(copy.deepcopy(tiny_base)), HfEngine(copy.deepcopy(tiny_base))
    identity = PolicyIdentity(
        engine, policy, policy.model, limit=FLOORS["float32"], every_steps=1, max_tokens=64, sampling=SAMPLING
    )
    run = SimpleNamespace(policy=policy, engine=engine, identity=identity, fingerprint="")
    synced(run, 1)
    return run


def synced(run, version: int) -> None:
    with torch.no_grad():
        run.policy._masters[NAME].add_(0.1)
    run.fingerprint = sync(run.policy.weights(), run.engine, version)
    run.identity.record_sync(version)


def check(run, version: int = 1) -> dict[str, float]:
    completions = [run.engine.generate([PROMPTS[0].token_ids] * 2, SAMPLING, [1, 2])]
    return run.identity.check(version, PROMPTS, completions, policy_version=version, fingerprint=run.fingerprint)


def test_an_honest_engine_passes_and_no_base_is_compared(run):
    metrics = check(run)

    assert metrics["identity/weights_gap_max"] < 1e-4 and metrics["identity/rollout_gap_max"] < 1e-4
    assert not any("base" in name or "adapter" in name for name in metrics)


def test_one_bit_in_the_engine_is_caught(run):
    run.engine.held_weights()[NAME].view(torch.int32)[3, 5] ^= 1

    with pytest.raises(PolicyIdentityError, match=f"it holds other values in 1 of 21 tensors, the first is {NAME}"):
        check(run)


def test_the_weights_of_an_older_version_are_named(run):
    before = run.engine.held_weights()[NAME].clone()
    synced(run, 2)
    run.engine.held_weights()[NAME].copy_(before)

    with pytest.raises(PolicyIdentityError, match="holds those of policy version 1"):
        check(run, 2)


def test_an_engine_that_computes_otherwise_with_the_right_weights_is_caught(run):
    decoder = run.engine._decoder
    decoder._scorings = [replace(scoring, scaling=2 * scoring.scaling) for scoring in decoder._scorings]

    with pytest.raises(PolicyIdentityError, match="when the tokens are scored anew: other weights or other kernels"):
        check(run)
