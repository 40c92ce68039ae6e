"""What a sample of an untrained policy's rollouts says about the run: success, signal, format, truncation, length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rlbench.config.algorithm import ADVANTAGES
from rlbench.config.schema import RunConfig
from rlbench.loops.evaluate import ACCURACY
from rlbench.records import RolloutGroup
from rlbench.rollouts.credit import shaped_rewards
from rlbench.tracking.metrics import summarise_rollouts
from rlbench.tracking.pass_rates import all_equal_at_k, pass_at_k, share_interval

FORMAT = "format"  # the reward component that counts completions of the agreed form


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A mean over prompts with its 95% interval.

    Example:
        Share(value=0.25, low=0.14, high=0.41)
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightNumbers:
    num_prompts: int
    samples_per_prompt: int
    group_size: int  # of the run
    pass_at: dict[int, Share]  # by k; empty without a component named accuracy
    no_signal: Share | None  # groups of the run's size whose rewards would be equal; None: credit needs no groups
    truncated: Share
    invalid_frac: float  # rollouts without a reward
    num_distinct_rewards: int
    metrics: dict[str, float]  # keys as in metrics.jsonl
    problems: dict[str, str]  # first message of each component that ended in an error or timeout


def measure(groups: Sequence[RolloutGroup], config: RunConfig) -> PreflightNumbers:
    """Numbers of rollouts that were sampled and scored as the run would.

    Args:
        groups: one a prompt, of equal size, at least the run's group size.
        config: of the run, derived.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    samples_per_prompt = len(groups[0].rollouts)
    cut = [fmean(r.completion.finish_reason == "length" for r in group.rollouts) for group in groups]
    return PreflightNumbers(
        num_prompts=len(groups),
        samples_per_prompt=samples_per_prompt,
        group_size=config.algorithm.group_size or 1,
        pass_at=_pass_at(groups, config.algorithm.group_size or 1),
        no_signal=_no_signal(groups, config),
        truncated=_share(cut, samples_per_prompt),
        invalid_frac=fmean(rollout.reward is None for rollout in rollouts),
        num_distinct_rewards=len({rollout.reward for rollout in rollouts} - {None}),
        metrics=summarise_rollouts(groups),
        problems=_problems(groups),
    )


def _pass_at(groups: Sequence[RolloutGroup], group_size: int) -> dict[int, Share]:
    """pass@1 and pass@group_size; a prompt with fewer verdicts than k is left out of pass@k."""
    counts = [_verdicts(group) for group in groups]
    shares = {}
    for k in sorted({1, group_size}):
        rates = [pass_at_k(len(found), sum(found), k) for found in counts if len(found) >= k]
        if rates:
            shares[k] = _share(rates, len(groups[0].rollouts) // k)
    return shares


def _verdicts(group: RolloutGroup) -> list[bool]:
    components = [r.components[ACCURACY] for r in group.rollouts if ACCURACY in r.components]
    return [component.value == 1.0 for component in components if component.value is not None]


def _no_signal(groups: Sequence[RolloutGroup], config: RunConfig) -> Share | None:
    """Of each prompt, the probability that `group_size` of its rollouts are rewarded alike.

    A prompt with fewer rewards than that takes all it has; one with none that can be compared counts as no signal.
    """
    if ADVANTAGES[config.algorithm.advantage].min_group_size < 2:
        return None
    rates = []
    for group in groups:
        shaped = shaped_rewards(
            group, config.algorithm, config.rewards, max_completion_tokens=config.sampling.max_tokens
        )
        k = min(config.algorithm.group_size or 1, len(shaped))
        rates.append(all_equal_at_k(shaped, k) if shaped else 1.0)
    return _share(rates, 1)


def _share(by_prompt: Sequence[float], samples_per_prompt: int) -> Share:
    low, high = share_interval(by_prompt, max(1, samples_per_prompt))
    return Share(value=fmean(by_prompt), low=low, high=high)


def _problems(groups: Sequence[RolloutGroup]) -> dict[str, str]:
    problems: dict[str, str] = {}
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        for name, component in rollout.components.items():
            if component.status in ("error", "timeout"):
                problems.setdefault(name, f"{component.status}: {component.message}")
    return problems
