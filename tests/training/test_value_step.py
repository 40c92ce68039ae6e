"""The critic: which states it sees, that policy and critic leave each other alone, checkpoints."""

from dataclasses import replace

import pytest
import torch

from rlbench.config.schema import AlgorithmConfig, LoraConfig, OptimConfig, RewardsConfig, RunConfig
from rlbench.data.packing import pack
from rlbench.models.base import storage_bytes
from rlbench.models.value_head import Critic
from rlbench.records import Completion, Prompt, Rollout, RolloutGroup, StateValues
from rlbench.rollouts.credit import credit
from rlbench.training.checkpoint import find_checkpoint, restore, save_checkpoint
from rlbench.training.optim import make_optimizer
from rlbench.training.update import make_minibatches
from rlbench.training.value_step import state_values, update_critic
from tests.rollouts.test_credit import make_group
from tests.training.test_checkpoint import make_update
from tests.training.test_step import make_policy, make_samples


def make_critic(base) -> Critic:
    """With values that differ."""
    critic = Critic(base, LoraConfig(rank=4), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in critic.named_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return critic


def one_group(*completions: tuple[int, ...], finish_reason: str = "stop") -> RolloutGroup:
    prompt = Prompt(prompt_id="train/0", text="?", token_ids=(5, 6, 7))
    rollouts = tuple(
        Rollout(
            rollout_id=f"1/train/0/{index}",
            prompt=prompt,
            completion=Completion(
                token_ids=token_ids,
                sampling_logprobs=(-1.0,) * len(token_ids),
                finish_reason=finish_reason,
                seed=index,
                policy_version=0,
                adapter_fingerprint="f",
            ),
            completion_text="",
            sample_index=index,
            components={},
            reward=1.0,
        )
        for index, token_ids in enumerate(completions)
    )
    return RolloutGroup(prompt=prompt, rollouts=rollouts)


def values_of(critic: Critic, group: RolloutGroup, *, bootstrap: bool = False, budget: int = 64) -> list[StateValues]:
    found = state_values(critic, [group], bootstrap_truncated=bootstrap, tokens_per_microbatch=budget)
    return [found[rollout.rollout_id] for rollout in group.rollouts]


def test_all_values_are_0_at_first(tiny_base):
    critic = Critic(tiny_base, LoraConfig(rank=4), seed=3)

    assert values_of(critic, one_group((8, 9, 10)))[0].values == (0.0, 0.0, 0.0)


def test_a_value_does_not_see_the_token_that_is_judged(tiny_base):
    first, second = values_of(make_critic(tiny_base), one_group((8, 9, 10, 11), (8, 9, 40, 11)))

    assert first.values[:3] == pytest.approx(second.values[:3], abs=1e-6)  # token 2 differs: its own state does not
    assert abs(first.values[3] - second.values[3]) > 1e-3


def test_the_value_after_a_cut_is_that_of_the_next_state_and_is_taken_only_where_asked(tiny_base):
    critic = make_critic(tiny_base)
    longer = values_of(critic, one_group((8, 9, 10, 11)))[0]
    cut = one_group((8, 9, 10), finish_reason="length")

    (bootstrapped,) = values_of(critic, cut, bootstrap=True, budget=5)  # prompt 3, completion 3 less its last token
    assert bootstrapped.last == pytest.approx(longer.values[3], abs=1e-6)
    assert bootstrapped.values == pytest.approx(longer.values[:3], abs=1e-6)
    assert values_of(critic, cut)[0].last == 0
    assert values_of(critic, one_group((8, 9, 10)), bootstrap=True)[0].last == 0  # it ended by itself


@pytest.mark.parametrize("bootstrap", [False, True])
def test_a_completion_without_tokens_has_no_values(tiny_base, bootstrap):
    critic = make_critic(tiny_base)
    options = {"bootstrap_truncated": bootstrap, "tokens_per_microbatch": 64}

    found = state_values(critic, [one_group((9, 1), (), (8,), finish_reason="length")], **options)

    assert {name: len(of_states.values) for name, of_states in found.items()} == {"1/train/0/0": 2, "1/train/0/2": 1}


def samples_with_values(seed: int = 0):
    return [
        replace(s, values=(0.0,) * len(s.token_ids), returns=tuple(a + 0.1 * i for i, a in enumerate(s.advantages)))
        for s in make_samples(seed)
    ]


def train_critic(critic: Critic, optimizer, seed: int, *, num_updates: int = 1, budget: int = 1000):
    minibatches = make_minibatches(
        samples_with_values(seed), PPO, tokens_per_microbatch=budget, max_completion_tokens=9, device="cpu"
    )
    return update_critic(
        critic, minibatches, optimizer, num_updates=num_updates, clip_value=None, max_grad_norm=0
    ).metrics


PPO = AlgorithmConfig(advantage="gae")


def test_training_the_critic_fits_the_returns_and_leaves_the_policy_alone(tiny_base):
    policy, critic = make_policy(tiny_base), Critic(tiny_base, LoraConfig(rank=4), seed=3)
    before, base_bytes = policy.adapter().fingerprint(), storage_bytes(tiny_base)
    optimizer = make_optimizer(critic.parameters(), OptimConfig(lr=0.01))

    first = train_critic(critic, optimizer, 0)
    last = [train_critic(critic, optimizer, 0) for _ in range(30)][-1]

    assert last["value/loss"] < 0.2 * first["value/loss"]
    assert policy.adapter().fingerprint() == before
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert not {id(p) for p in policy.parameters()} & {id(p) for p in critic.parameters()}
    own = sum(p.numel() * 4 for p in critic.parameters())
    # no second base: of a critic only its own parameters are new
    assert storage_bytes(tiny_base, critic._backbone.model, critic.head) == base_bytes + own


def test_the_policy_moves_bit_for_bit_alike_beside_a_critic(tiny_base):
    fingerprints = []
    for has_critic in (False, True):
        policy = make_policy(tiny_base)
        optimizer = make_optimizer(policy.parameters(), OptimConfig(lr=0.01))
        if has_critic:
            critic = make_critic(tiny_base)
            train_critic(critic, make_optimizer(critic.parameters(), OptimConfig(lr=0.01)), 0)
        make_update(policy, optimizer, 1)
        fingerprints.append(policy.adapter().fingerprint())

    assert fingerprints[0] == fingerprints[1]


def test_the_gradient_does_not_depend_on_the_split_into_microbatches(tiny_base):
    moved = []
    for budget in (1000, 20):
        critic = make_critic(tiny_base)
        train_critic(critic, torch.optim.SGD(critic.parameters(), lr=1.0), 0, budget=budget)
        moved.append([p.detach().clone() for p in critic.parameters()])

    for whole, split in zip(*moved, strict=True):
        torch.testing.assert_close(whole, split, rtol=1e-4, atol=1e-5)


def test_the_critic_goes_on_bit_for_bit_after_a_restore(tiny_base, tmp_path):
    def fresh():
        critic, policy = Critic(tiny_base, LoraConfig(rank=4), seed=3), make_policy(tiny_base)
        return (critic, make_optimizer(critic.parameters(), OptimConfig(lr=0.01))), (
            policy,
            make_optimizer(policy.parameters(), OptimConfig(lr=1e-4)),
        )

    of_critic, of_policy = fresh()
    train_critic(*of_critic, 0)
    save_checkpoint(tmp_path, *of_policy, {"step": 1}, base_name="tiny", keep_last=1, beside={"critic": of_critic})
    restored, other_policy = fresh()
    restore(find_checkpoint(tmp_path)[0], *other_policy, {"critic": restored})
    for pair in (of_critic, restored):
        train_critic(*pair, 1)

    for ours, theirs in zip(of_critic[0].parameters(), restored[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert restored[0].head.weight.abs().max() > 0


def test_a_checkpoint_without_a_critic_is_refused(tiny_base, tmp_path):
    policy, critic = make_policy(tiny_base), make_critic(tiny_base)
    optimizer = make_optimizer(policy.parameters(), OptimConfig(lr=1e-4))
    save_checkpoint(tmp_path, policy, optimizer, {"step": 1}, base_name="tiny", keep_last=1)

    with pytest.raises(ValueError, match="has no critic; expected a checkpoint of a run with equal algorithm"):
        restore(find_checkpoint(tmp_path)[0], policy, optimizer, {"critic": (critic, None)})


def test_credit_gives_each_token_its_advantage_and_the_critic_its_target():
    config = AlgorithmConfig(advantage="gae", advantage_scale="none", kl_in="reward", kl_coef=0.1, kl="k1")
    config.critic.returns_lambda = 1.0
    config.critic.gae_lambda = 0.0
    values = {"1/a/0": StateValues(values=(0.1, 0.2, 0.4), last=0.0)}

    (sample,) = credit(
        [make_group("a", [1.0])], config, RewardsConfig(), token_kl={"1/a/0": [1.0, 2.0, 3.0]}, state_values=values
    ).samples

    assert sample.advantages == pytest.approx((-0.1 + 0.2 - 0.1, -0.2 + 0.4 - 0.2, 1 - 0.3 - 0.4))
    assert sample.returns == pytest.approx((1 - 0.6, 1 - 0.5, 1 - 0.3))
    assert sample.values == (0.1, 0.2, 0.4)
    (microbatch,) = pack([sample], tokens_per_microbatch=64, device="cpu")
    assert microbatch.returns.tolist() == pytest.approx(sample.returns)


def test_rollouts_without_values_are_a_clear_error():
    with pytest.raises(ValueError, match="algorithm.advantage is gae, which needs the values of the run's critic"):
        credit([make_group("a", [1.0])], PPO, RewardsConfig())


def test_settings_of_the_critic_without_a_critic_are_errors():
    config = RunConfig()
    config.algorithm.critic.lr = 1.0
    with pytest.raises(ValueError, match="algorithm.critic.lr is 1.0, but algorithm.advantage=group_relative has no"):
        replace(config.algorithm)
    with pytest.raises(ValueError, match="algorithm.critic.lr is 1.0, but stage=sft does not read it"):
        replace(config, stage="sft")


def test_equal_rewards_still_teach_the_critic():
    values = {f"1/a/{i}": StateValues(values=(0.0,) * 3, last=0.0) for i in range(2)}
    config = AlgorithmConfig(advantage="gae")
    config.critic.gae_lambda = 1.0

    result = credit([make_group("a", [1.0, 1.0])], config, RewardsConfig(), state_values=values)

    assert {sample.advantages for sample in result.samples} == {(0.0,) * 3} and result.has_signal
    assert not credit([make_group("a", [0.0, 0.0])], config, RewardsConfig(), state_values=values).has_signal
