"""From a rollout's components to its reward: a sum, a product, a sum of normalised values; gates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rlbench_rewards.contract import SKIPPED, VALUE

SUM, PRODUCT, NORMALISED_SUM = "sum", "product", "normalised_sum"
WAYS = (SUM, PRODUCT, NORMALISED_SUM)
_EPSILON = 1e-4  # as in group-relative advantages


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """How one component enters the reward.

    Example:
        Term(weight=0.0, gate_min=1.0)  # a format that only opens or closes the gate for the others
    """

    weight: float = 1.0
    gate_min: float | None = None  # a value below it closes the gate; None: no gate


@dataclass(frozen=True, slots=True)
class Scored:
    status: str
    value: float | None


def compose(
    group: Sequence[Mapping[str, Scored]], terms: Mapping[str, Term], *, way: str = SUM, gated_value: float = 0.0
) -> list[float | None]:
    """Rewards of the rollouts of one prompt; None where a component that counts has no value.

    With v the values and w the weights: sum is Σ w·v, product is Π w·v, normalised_sum is Σ w·(v - mean) / (std + 1e-4)
    with mean and standard deviation (population) of that component in this group. A closed gate makes the reward
    `gated_value`. Components of weight 0 that are no gate are only watched: they may break. Skipped ones are left out;
    a rollout whose components are all skipped has no reward.

    Source: normalising each component before the sum: GDPO, arXiv:2601.05242.
    """
    counting = {name: term for name, term in terms.items() if term.weight or term.gate_min is not None}
    summed = {name: term for name, term in counting.items() if term.weight}
    if way == NORMALISED_SUM:
        scales = {name: _scale([rollout[name].value for rollout in group]) for name in summed}
    else:
        scales = dict.fromkeys(summed, (0.0, 1.0))
    return [_reward(rollout, counting, scales, way, gated_value) for rollout in group]


def _reward(
    rollout: Mapping[str, Scored],
    counting: Mapping[str, Term],
    scales: Mapping[str, tuple[float, float]],
    way: str,
    gated_value: float,
) -> float | None:
    applied = {name: rollout[name] for name in counting if rollout[name].status != SKIPPED}
    values = {name: scored.value for name, scored in applied.items() if scored.status == VALUE}
    if not values or len(values) < len(applied):
        return None
    for name, value in values.items():
        least = counting[name].gate_min
        if least is not None and value is not None and value < least:
            return gated_value
    weighted = [
        counting[name].weight * (value - scales[name][0]) / scales[name][1]
        for name, value in values.items()
        if name in scales and value is not None
    ]
    if way == PRODUCT:
        return math.prod(weighted) if weighted else None
    return math.fsum(weighted)


def _scale(values: Sequence[float | None]) -> tuple[float, float]:
    """Mean and divisor of the values there are."""
    present = [value for value in values if value is not None]
    if not present:
        return 0.0, 1.0
    mean = fmean(present)
    return mean, math.sqrt(fmean([(value - mean) ** 2 for value in present])) + _EPSILON
