"""A reference that follows the policy: how far it moves, what reads it, that it is saved."""

import pytest
import torch

from rlbench.config.schema import AlgorithmConfig, LoraConfig, OptimConfig
from rlbench.data.packing import pack
from rlbench.models.policy import Policy
from rlbench.records import Rollout
from rlbench.training.checkpoint import find_checkpoint, restore, save_checkpoint
from rlbench.training.optim import make_optimizer
from rlbench.training.reference_kl import reference_kl, refresh_reference, unscored_sample
from rlbench.training.step import fixed_columns, policy_logprobs, reference_logprobs
from tests.rollouts.test_credit import emptied, make_group
from tests.training.test_checkpoint import make_update
from tests.training.test_step import make_policy, make_samples


@pytest.fixture
def pair(tiny_base) -> tuple[Policy, Policy]:
    """Two different policies; the first one's adapter is not zero."""
    return make_policy(tiny_base), Policy(tiny_base, LoraConfig(rank=4, alpha=8), seed=9)


def batch():
    return pack(make_samples(0), tokens_per_microbatch=1000, device="cpu")[0]


def test_a_copy_is_exact_and_a_part_is_the_linear_mean(pair):
    policy, reference = pair
    before = [p.detach().clone() for p in reference.parameters()]

    refresh_reference(reference, policy, 0.25)
    for old, theirs, now in zip(before, policy.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * old + 0.25 * theirs)
    refresh_reference(reference, policy, 1.0)

    assert reference.adapter().fingerprint() == policy.adapter().fingerprint()


def test_right_after_a_copy_the_kl_is_0_and_the_next_update_leaves_the_reference(pair):
    policy, reference = pair
    refresh_reference(reference, policy, 1.0)
    fingerprint = reference.adapter().fingerprint()

    assert torch.equal(reference_logprobs(policy, batch(), 1.0, reference), policy_logprobs(policy, batch(), 1.0)[0])
    make_update(policy, make_optimizer(policy.parameters(), OptimConfig(lr=0.01)), 0)
    assert reference.adapter().fingerprint() == fingerprint != policy.adapter().fingerprint()


def logits_of(policy: Policy, rollout: Rollout) -> torch.Tensor:
    """All of them, at the positions before the completion's tokens."""
    (microbatch,) = pack([unscored_sample(rollout)], tokens_per_microbatch=30, device="cpu")
    with torch.no_grad():
        return policy.hidden(microbatch).float() @ policy.head_weight.float().T


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("has_copy", [False, True])
def test_the_kl_of_a_token_in_the_reward_is_log_policy_minus_log_reference(tiny_base, pair, temperature, has_copy):
    policy, reference = pair
    refresh_reference(reference, policy, 0.5)
    groups = [make_group("a", [1.0, None]), emptied(make_group("b", [0.0, 0.5, 1.0]), 2)]

    found = reference_kl(
        policy, groups, estimator="k1", temperature=temperature, tokens_per_microbatch=30,
        reference=reference if has_copy else None,
    )  # fmt: skip

    rollout = groups[0].rollouts[0]
    ours = logits_of(policy, rollout)
    if has_copy:
        theirs = logits_of(reference, rollout)
    else:
        with policy.reference():
            theirs = logits_of(policy, rollout)
    gaps = (ours / temperature).log_softmax(-1) - (theirs / temperature).log_softmax(-1)
    expected = gaps.gather(-1, torch.tensor(rollout.completion.token_ids)[:, None])[:, 0]
    assert set(found) == {"1/a/0", "1/b/0", "1/b/1"}  # a rollout without a reward, or without tokens, has none
    torch.testing.assert_close(torch.tensor(found["1/a/0"]), expected, rtol=1e-3, atol=1e-5)
    assert expected.abs().max() > 1e-3


def test_the_loss_reads_the_copy_and_without_one_the_base(pair):
    policy, reference = pair
    config = AlgorithmConfig(kl_coef=0.1)

    def of(chosen: Policy | None) -> torch.Tensor:
        return fixed_columns(policy, [batch()], config, temperature=1.0, seed=0, reference=chosen)[0]["ref_logprobs"]

    with policy.model.disable_adapter():
        base = policy_logprobs(policy, batch(), 1.0)[0]
    assert torch.equal(of(None), base)
    assert torch.equal(of(policy), policy_logprobs(policy, batch(), 1.0)[0])
    assert not torch.allclose(of(policy), base)
    assert not of(reference).requires_grad


def test_checkpoints_hold_the_reference(pair, tiny_base, tmp_path):
    policy, reference = pair
    optimizer = make_optimizer(policy.parameters(), OptimConfig(lr=1e-4))
    save_checkpoint(
        tmp_path, policy, optimizer, {"step": 1}, base_name="tiny", keep_last=1, beside={"reference": (reference, None)}
    )
    restored = make_policy(tiny_base)

    restore(find_checkpoint(tmp_path)[0], make_policy(tiny_base), optimizer, {"reference": (restored, None)})

    assert restored.adapter().fingerprint() == reference.adapter().fingerprint()


BAD = {
    "nothing reads it": ({"reference_refresh_steps": 5}, "algorithm.kl_coef is 0 and nothing reads the reference"),
    "no refresh": ({"reference_refresh_frac": 0.5, "kl_coef": 0.1}, "algorithm.reference_refresh_steps is 0"),
    "too far": ({"reference_refresh_frac": 2.0, "reference_refresh_steps": 1, "kl_coef": 0.1}, "refresh_frac is 2.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_do_nothing_are_errors(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        AlgorithmConfig(**options)
