"""Two policies' answers to the same prompts, prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from rlbench.tracking.intervals import difference_interval, paired_interval, sign_test_p

if TYPE_CHECKING:
    from rlbench.commands.eval_measure import Measured

ACCURACY, SAMPLED, REWARD = "accuracy", "sampled accuracy", "reward"


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """The difference of a number that both policies have for each of the same prompts: `after` less `before`.

    Example:
        Paired(what="accuracy", num=64, before=0.0, after=0.05, low=-0.005, high=0.1, num_gained=3, num_lost=0, p=0.25)
    """

    what: str  # accuracy | sampled accuracy | reward
    num: int  # prompts for which both have it
    before: float
    after: float
    low: float | None  # 95% interval of the difference; None: too few prompts
    high: float | None
    num_gained: int  # prompts on which it rose
    num_lost: int
    p: float  # of the exact sign test

    @property
    def difference(self) -> float:
        return self.after - self.before


def compare(policy: Measured, against: Measured) -> list[Paired]:
    """The differences of accuracy and, where both have sampled answers, of theirs; without a verdict on accuracy of the
    reward."""
    pairs = {
        ACCURACY: (against.evaluation.is_correct, policy.evaluation.is_correct),
        SAMPLED: (against.evaluation.sampled, policy.evaluation.sampled),
    }
    found = [_pair(what, *values) for what, values in pairs.items()]
    if not any(found):
        found = [_pair(REWARD, _rewards(against), _rewards(policy))]
    return [paired for paired in found if paired is not None]


def _pair(what: str, before: Mapping[str, float], after: Mapping[str, float]) -> Paired | None:
    both = [problem for problem in after if problem in before]
    if not both:
        return None
    old, new = [float(before[problem]) for problem in both], [float(after[problem]) for problem in both]
    num_gained = sum(b > a for a, b in zip(old, new, strict=True))
    num_lost = sum(b < a for a, b in zip(old, new, strict=True))
    low, high = _interval(what, old, new)
    return Paired(
        what=what,
        num=len(both),
        before=fmean(old),
        after=fmean(new),
        low=low,
        high=high,
        num_gained=num_gained,
        num_lost=num_lost,
        p=sign_test_p(num_gained, num_lost),
    )


def _interval(what: str, old: list[float], new: list[float]) -> tuple[float | None, float | None]:
    """Of the mean difference. Where no two prompts differ in it, its spread says nothing: shares are then compared as
    if they were independent, which is wider."""
    if len({b - a for a, b in zip(old, new, strict=True)}) > 1:
        return paired_interval(old, new)
    if what == REWARD:
        return None, None
    return difference_interval(sum(old), len(old), sum(new), len(new))


def _rewards(measured: Measured) -> dict[str, float]:
    rollouts = [group.rollouts[0] for group in measured.groups]
    return {r.prompt.prompt_id: r.reward for r in rollouts if r.reward is not None}
