"""GAE against a plain double sum, its two limits, whitening; the value loss against hand-computed numbers and laws."""

import math
import random

import pytest
import torch

from rlbench.algorithms import ADVANTAGES
from rlbench.algorithms.advantages import GroupReturns
from rlbench.algorithms.gae import estimate, value_targets
from rlbench.algorithms.value_losses import clipped_value_loss, explained_variance


def by_definition(rewards, values, last, gamma, lam) -> list[float]:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, every term written out."""
    following = [*values[1:], last]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def ragged(seed: int, *, num_groups: int = 3, kl: bool = True) -> tuple[list[GroupReturns], list[list[float]]]:
    """Groups with values, and the rewards of each token of every rollout."""
    rng = random.Random(seed)
    groups, token_rewards = [], []
    for _ in range(num_groups):
        lengths = [rng.randint(1, 9) for _ in range(rng.randint(1, 4))]
        rewards = [[(-0.1 * rng.random() if kl else 0.0) for _ in range(n)] for n in lengths]
        for tokens in rewards:
            tokens[-1] += rng.random()
        token_rewards += rewards
        groups.append(
            GroupReturns(
                returns=[[math.fsum(tokens[t:]) for t in range(len(tokens))] for tokens in rewards],
                values=[[rng.gauss(0, 1) for _ in range(n)] for n in lengths],
                last_values=[rng.choice([0.0, rng.gauss(0, 1)]) for _ in lengths],
            )
        )
    return groups, token_rewards


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_advantages_of_ragged_batches_are_those_of_the_definition(seed, gamma, lam):
    groups, rewards = ragged(seed)
    got = [tokens for group in ADVANTAGES["gae"](groups, scale="none", gamma=gamma, gae_lambda=lam) for tokens in group]
    states = [(v, last) for group in groups for v, last in zip(group.values, group.last_values, strict=True)]

    for ours, r, (values, last) in zip(got, rewards, states, strict=True):
        assert ours == pytest.approx(by_definition(r, values, last, gamma, lam), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("scale", ["batch", "none"])
def test_advantages_follow_a_permutation_within_a_group(scale):
    groups, _ = ragged(4)
    order = list(range(len(groups[0].returns)))[::-1]
    permuted = GroupReturns(
        returns=[groups[0].returns[i] for i in order], values=[groups[0].values[i] for i in order],
        last_values=[groups[0].last_values[i] for i in order],
    )  # fmt: skip
    options = {"scale": scale, "gamma": 0.9, "gae_lambda": 0.8}

    straight, other = (ADVANTAGES["gae"](part, **options) for part in (groups, [permuted, *groups[1:]]))

    assert len(order) > 1
    for ours, theirs in zip([*other[0], *other[1]], [*(straight[0][i] for i in order), *straight[1]], strict=True):
        assert ours == pytest.approx(theirs)


def test_with_lambda_1_the_critic_learns_the_return_and_with_0_one_step_ahead():
    groups = [GroupReturns(returns=[[0.7, 0.8, 1.0]], values=[[0.1, 0.2, 0.4]], last_values=[0.0])]

    assert value_targets(groups, gamma=1.0, gae_lambda=1.0)[0][0] == pytest.approx([0.7, 0.8, 1.0])
    assert value_targets(groups, gamma=1.0, gae_lambda=0.0)[0][0] == pytest.approx([-0.1 + 0.2, -0.2 + 0.4, 1.0])


def test_the_value_after_a_cut_counts_as_reward():
    cut = estimate([0.0, 0.0], [0.5, 0.5], 2.0, gamma=0.9, gae_lambda=1.0)
    rewarded = estimate([0.0, 0.9 * 2.0], [0.5, 0.5], 0.0, gamma=0.9, gae_lambda=1.0)

    assert cut == pytest.approx(rewarded) and cut != pytest.approx(
        estimate([0.0, 0.0], [0.5, 0.5], 0.0, gamma=0.9, gae_lambda=1.0)
    )


def test_whitened_advantages_have_mean_0_and_deviation_1_over_the_tokens_of_the_step():
    groups, _ = ragged(4, num_groups=20)
    flat = [
        a for g in ADVANTAGES["gae"](groups, scale="batch", gamma=1.0, gae_lambda=0.95) for tokens in g for a in tokens
    ]

    assert torch.tensor(flat).mean().item() == pytest.approx(0, abs=1e-6)
    assert torch.tensor(flat).std().item() == pytest.approx(1, abs=1e-3)


def loss_tensors(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    values, old, returns = (torch.randn(40, generator=generator) for _ in range(3))
    mask = torch.rand(40, generator=generator) > 0.3
    return values.requires_grad_(), old, returns, mask


def test_the_value_loss_matches_hand_computed_values():
    values = torch.tensor([1.0, 0.1, 0.0, 9.0], requires_grad=True)
    old, returns = torch.tensor([0.0, 0.0, 0.5, 0.0]), torch.tensor([2.0, 1.0, 0.4, 0.0])
    mask = torch.tensor([True, True, True, False])

    loss, clip_frac = clipped_value_loss(values, old, returns, mask, clip_value=0.2, num_loss_tokens=3)
    loss.backward()

    # (0.2 - 2)^2 > (1 - 2)^2: clipped; (0.1 - 1)^2 not; (0.3 - 0.4)^2 < (0 - 0.4)^2: the larger error counts, unclipped
    assert loss.item() == pytest.approx(0.5 * (1.8**2 + 0.9**2 + 0.4**2) / 3)
    assert clip_frac.item() == pytest.approx(1 / 3)
    assert values.grad.tolist() == pytest.approx([0.0, -0.9 / 3, -0.4 / 3, 0.0])


def test_a_value_is_clipped_downwards_too_and_masked_tokens_are_in_no_share():
    values = torch.tensor([-1.0, 1.0], requires_grad=True)
    old, returns, mask = torch.zeros(2), torch.tensor([-2.0, 2.0]), torch.tensor([True, False])

    loss, clip_frac = clipped_value_loss(values, old, returns, mask, clip_value=0.2, num_loss_tokens=1)

    assert loss.item() == pytest.approx(0.5 * 1.8**2)
    assert clip_frac == 1


def test_the_value_loss_does_not_depend_on_the_split():
    values, old, returns, mask = loss_tensors(1)
    options = {"clip_value": 0.3, "num_loss_tokens": int(mask.sum())}

    whole, whole_frac = clipped_value_loss(values, old, returns, mask, **options)
    parts = [clipped_value_loss(values[s], old[s], returns[s], mask[s], **options) for s in (slice(0, 7), slice(7, 40))]

    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    torch.testing.assert_close(parts[0][1] + parts[1][1], whole_frac)
    assert 0 < whole_frac < 1


def test_without_a_clip_the_value_loss_is_half_the_squared_error():
    values, old, returns, mask = loss_tensors(2)

    loss, clip_frac = clipped_value_loss(values, old, returns, mask, clip_value=None, num_loss_tokens=int(mask.sum()))

    torch.testing.assert_close(loss, 0.5 * torch.nn.functional.mse_loss(values[mask], returns[mask]))
    assert clip_frac == 0


def test_explained_variance_is_1_for_perfect_values_and_0_for_a_constant():
    returns = torch.tensor([0.0, 1.0, 0.0, 1.0])

    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((4,), 0.3), returns) == pytest.approx(0)
    assert explained_variance(1 - returns, returns) == pytest.approx(-3)
    assert math.isnan(explained_variance(returns, torch.ones(4)))
