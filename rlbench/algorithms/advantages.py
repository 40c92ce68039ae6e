"""Advantages of a step's rollouts from their rewards: plain numbers, one list of tokens a rollout.

Every function takes the groups of a step and returns, for each group and rollout, the advantage of each token. Here
only `reinforce_plus_plus` tells the tokens of a rollout apart, and only with a KL penalty in the reward; `gae` and
`teacher` are in modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

_EPSILON = 1e-4  # keeps a group of almost equal rewards from exploding; the value of TRL's code
_ROUNDING = 1e-12  # relative; rewards add up to the same number in several ways, 0.1 + 0.2 and 0.3

TokenAdvantages = list[list[list[float]]]  # [group][rollout][token]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReturns:
    """The rollouts of one prompt that have a reward.

    `returns[i][t]` is the reward of rollout i less the KL penalties from token t on; without a penalty in the reward
    all tokens have the reward.

    Example:
        GroupReturns(returns=[[1.0, 1.0], [0.0]], components={"accuracy": [1.0, 0.0]}, weights={"accuracy": 1.0})
    """

    returns: Sequence[Sequence[float]]
    components: Mapping[str, Sequence[float | None]] = field(default_factory=dict)  # each reward apart; None: not given
    weights: Mapping[str, float] = field(default_factory=dict)  # of the components
    values: Sequence[Sequence[float]] = ()  # of a critic, as `returns`: of the state before each token
    last_values: Sequence[float] = ()  # of the state after each rollout
    teacher_gaps: Sequence[Sequence[float]] = ()  # log student - log teacher of each token, as `returns`

    @property
    def rewards(self) -> list[float]:
        """Of whole rollouts: the returns from the first token on."""
        return [tokens[0] for tokens in self.returns]

    def spread(self, values: Sequence[float]) -> list[list[float]]:
        """One value a rollout, repeated for its tokens."""
        return [[value] * len(tokens) for value, tokens in zip(values, self.returns, strict=True)]


def group_relative(groups: Sequence[GroupReturns], *, scale: str) -> TokenAdvantages:
    """A_i = r_i - mean(r), divided by std + 1e-4 of the group's (scale=group) or the step's (batch) rewards, or not.

    scale=group is GRPO; none is Dr.GRPO, which does not favour prompts that are almost solved or almost hopeless.

    Args:
        groups: of one step; each with at least two rollouts.
        scale: group | batch | none. Sample standard deviations.

    Returns:
        Exactly 0.0 in a group of equal rewards.

    Raises:
        ValueError: a group with fewer than two rewards: there is nothing to compare.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1; Liu et al. 2025, arXiv:2503.20783, section 3.2.
    """
    batch_scale = _batch_std(groups) + _EPSILON if scale == "batch" else 1.0
    advantages = []
    for group in groups:
        distances = _distances(group.rewards)
        by = _std(group.rewards) + _EPSILON if scale == "group" else batch_scale
        advantages.append(group.spread([distance / by for distance in distances]))
    return advantages


def leave_one_out(groups: Sequence[GroupReturns], *, scale: str) -> TokenAdvantages:
    """A_i = r_i - mean of the other rewards of the group = (r_i - mean(r)) G / (G - 1).

    The baseline is independent of the rollout, so the gradient is unbiased. scale=batch normalises the step's
    advantages: (A - mean(A)) / (std(A) + 1e-4).

    Args:
        groups: of one step; each with at least two rollouts.
        scale: batch | none.

    Raises:
        ValueError: a group with fewer than two rewards.

    Source: Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740 (RLOO).
    """
    values = [
        [distance * len(group.rewards) / (len(group.rewards) - 1) for distance in _distances(group.rewards)]
        for group in groups
    ]
    if scale == "batch":
        values = _normalised(values)
    return [group.spread(part) for group, part in zip(groups, values, strict=True)]


def gdpo(groups: Sequence[GroupReturns]) -> TokenAdvantages:
    """Each reward normalised within its group, then the weighted sum, then normalised over the step.

    With several rewards their sum can make different rollouts equal; apart, each keeps its resolution, and a weight
    says how much a reward counts, whatever its spread. A reward that does not apply to a rollout (None) is no 0: mean
    and deviation are of the others, and it adds nothing.

    Args:
        groups: of one step, each with at least two rollouts.

    Source: Liu et al. 2026, arXiv:2601.05242 (GDPO).
    """
    values = []
    for group in groups:
        sums = [0.0] * len(group.rewards)
        for name, rewards in group.components.items():
            sums = [s + group.weights[name] * n for s, n in zip(sums, _normalised_present(rewards), strict=True)]
        values.append(sums)
    return [group.spread(part) for group, part in zip(groups, _normalised(values), strict=True)]


def reinforce_plus_plus(groups: Sequence[GroupReturns]) -> TokenAdvantages:
    """A_t = (R_t - mean(R)) / (std(R) + 1e-4) over all tokens of the step, R_t the return from token t on.

    No comparison within groups, so one completion a prompt suffices. Meant for the KL penalty in the reward:
    R_t = r - kl_coef sum_{s >= t} kl_s.

    Args:
        groups: of one step, together with at least two rollouts.

    Source: Hu et al. 2025, arXiv:2501.03262; mean and deviation over tokens as in OpenRLHF.
    """
    return normalised_over_tokens([[list(tokens) for tokens in group.returns] for group in groups])


def reinforce_plus_plus_baseline(groups: Sequence[GroupReturns]) -> TokenAdvantages:
    """r_i - mean(r) of the group, then normalised over all tokens of the step.

    Args:
        groups: of one step; each with at least two rollouts.

    Source: Hu et al. 2025, arXiv:2501.03262 (REINFORCE++ with baseline).
    """
    return normalised_over_tokens([group.spread(_distances(group.rewards)) for group in groups])


def maxrl(groups: Sequence[GroupReturns]) -> TokenAdvantages:
    """A_i = (r_i - mean(r)) / mean(r), all 0 where the mean is 0: hard prompts weigh by one over their success rate.

    Follows the gradient of log P(success) for rewards 0 and 1, to the order that the group size allows.

    Args:
        groups: of one step; each with at least two rollouts; rewards not negative.

    Raises:
        ValueError: a reward is negative.

    Source: Tajwar et al. 2026, arXiv:2602.02710.
    """
    advantages = []
    for group in groups:
        if min(group.rewards) < 0:
            raise ValueError(
                f"algorithm.advantage is maxrl, but a reward is {min(group.rewards)}; expected rewards of at least 0"
            )
        mean = fmean(group.rewards)
        advantages.append(group.spread([d / mean if mean > 0 else 0.0 for d in _distances(group.rewards)]))
    return advantages


def are_equal(values: Sequence[float]) -> bool:
    """Whether all values are the same number, but for rounding; true of none."""
    if not values:
        return True
    low, high = min(values), max(values)
    return high - low <= _ROUNDING * max(abs(low), abs(high))


def _distances(rewards: Sequence[float]) -> list[float]:
    """r - mean(r), exactly 0.0 where all are equal."""
    if len(rewards) < 2:
        raise ValueError(f"group-relative advantages need at least two rewards, got {len(rewards)}")
    if are_equal(rewards):
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    return [reward - mean for reward in rewards]


def _std(values: Sequence[float]) -> float:
    return 0.0 if are_equal(values) else stdev(values)


def _normalised_present(rewards: Sequence[float | None]) -> list[float]:
    """(r - mean) / (std + 1e-4) of the rewards there are, 0 elsewhere."""
    if len(rewards) < 2:
        raise ValueError(f"group-relative advantages need at least two rewards, got {len(rewards)}")
    present = [reward for reward in rewards if reward is not None]
    if are_equal(present):
        return [0.0] * len(rewards)
    mean, by = fmean(present), _std(present) + _EPSILON
    return [0.0 if reward is None else (reward - mean) / by for reward in rewards]


def _batch_std(groups: Sequence[GroupReturns]) -> float:
    return _std([reward for group in groups for reward in group.rewards])


def _normalised(values: list[list[float]]) -> list[list[float]]:
    """(x - mean) / (std + 1e-4) over all rollouts; zeros where all are equal, and where x and the mean are 0."""
    flat = [value for part in values for value in part]
    if are_equal(flat):
        return [[0.0] * len(part) for part in values]
    mean, by = fmean(flat), _std(flat) + _EPSILON
    if abs(mean) <= _ROUNDING * max(map(abs, flat)):  # of distances: a group without signal keeps exactly none
        mean = 0.0
    return [[(value - mean) / by for value in part] for part in values]


def normalised_over_tokens(values: TokenAdvantages) -> TokenAdvantages:
    """(x - mean) / (std + 1e-4) over all tokens of the step; zeros where all are equal."""
    rollouts = [tokens for group in values for tokens in group]
    normalised = iter(_normalised(rollouts))
    return [[next(normalised) for _ in group] for group in values]


GROUP_ADVANTAGES: dict[str, Callable[..., TokenAdvantages]] = {
    "group_relative": group_relative,
    "leave_one_out": leave_one_out,
    "gdpo": gdpo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "maxrl": maxrl,
}
