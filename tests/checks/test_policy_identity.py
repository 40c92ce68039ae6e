"""Rollouts from other weights than the trainer's stop the run."""

import pytest
import torch

from rlbench.checks.policy_identity import PolicyIdentityError, check_logprob_gap, check_policy_identity
from rlbench.config.schema import LoraConfig
from rlbench.engine.hf_engine import HfEngine
from rlbench.models.policy import Policy
from rlbench.records import SamplingParams
from rlbench.weight_sync import sync
from tests.models.test_lora import randomise


def sample(engine):
    return engine.generate([(5, 6, 7)] * 4, SamplingParams(max_tokens=5), [1, 2, 3, 4])


@pytest.fixture
def synced(tiny_base):
    policy, engine = Policy(tiny_base, LoraConfig(rank=4), seed=0), HfEngine(tiny_base)
    randomise(policy.model)
    return policy, engine, sync(policy.adapter(), engine, 1)


def test_rollouts_of_the_synced_adapter_pass(synced):
    _, engine, fingerprint = synced

    check_policy_identity(sample(engine), policy_version=1, adapter_fingerprint=fingerprint)


def test_a_skipped_sync_is_caught(synced):
    policy, engine, _ = synced
    with torch.no_grad():
        policy.parameters()[0].add_(0.1)

    with pytest.raises(PolicyIdentityError, match="sampled by policy version 1, but the trainer is at 2"):
        check_policy_identity(sample(engine), policy_version=2, adapter_fingerprint=policy.adapter().fingerprint())


def test_other_bytes_under_the_same_version_are_caught(synced):
    policy, engine, _ = synced
    with torch.no_grad():
        policy.parameters()[0][0, 0] += 1e-6

    with pytest.raises(PolicyIdentityError, match="other bytes"):
        check_policy_identity(sample(engine), policy_version=1, adapter_fingerprint=policy.adapter().fingerprint())


def test_rollouts_of_the_base_are_caught(tiny_base, synced):
    _, _, fingerprint = synced
    never_synced = HfEngine(tiny_base)

    with pytest.raises(PolicyIdentityError, match="sampled with adapter base"):
        check_policy_identity(sample(never_synced), policy_version=0, adapter_fingerprint=fingerprint)


def test_a_gap_of_logprobs_above_the_limit_stops():
    check_logprob_gap(0.04, limit=0.3)
    with pytest.raises(PolicyIdentityError, match="differ by 0.700 nats on average"):
        check_logprob_gap(0.7, limit=0.3)
