"""A curriculum by measured success rates: prompts are drawn in proportion to the chance that they teach something.

A group teaches if it holds right and wrong answers. A prompt's rate of right answers has a Beta distribution: the rate
of all prompts together, counted as `prior_weight` answers, and the prompt's own answers, the older ones for less.

Source: learnability p(1 - p), Foster and Foerster 2025, arXiv:2502.12272; here for whole groups and with the
uncertainty of p.

Shapes: N prompts, K kinds of prompts with equal answers.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlbench.config.curriculum import CurriculumConfig
from rlbench.data.answer_counts import AnswerCounts
from rlbench.data.stream import PromptStream
from rlbench.records import Prompt, RolloutGroup


def signal_chance(num_right: Any, num_wrong: Any, group_size: int) -> Any:
    """Probability that `group_size` answers are not all right and not all wrong, if p ~ Beta(num_right, num_wrong).

    1 - E[p^G] - E[(1 - p)^G], E[p^G] = prod_{i < G} (a + i) / (a + b + i).

    Args:
        num_right: a > 0; a number, or an array of any shape.
        num_wrong: b > 0, as `num_right`.
        group_size: G, at least 1.

    Returns:
        As `num_right`.
    """
    total = num_right + num_wrong
    all_right = all_wrong = 1.0
    for i in range(group_size):
        all_right = all_right * ((num_right + i) / (total + i))
        all_wrong = all_wrong * ((num_wrong + i) / (total + i))
    return np.maximum(0.0, 1.0 - all_right - all_wrong)


class CurriculumStream(PromptStream[Prompt]):
    """Draws of a step are all different, and a function of the seed and of what was observed before."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, config: CurriculumConfig, group_size: int) -> None:
        """
        Args:
            prompts: with different prompt_ids.
            seed: of the draws.
            config: algorithm.curriculum.
            group_size: algorithm.group_size.
        """
        super().__init__(prompts, seed)
        self._config = config
        self._group_size = group_size
        self._answers = AnswerCounts([prompt.prompt_id for prompt in prompts])
        self._num_draws = 0
        self._expected = 0.0

    def next(self, count: int) -> list[Prompt]:
        """Up to `count` prompts, without repeats.

        Source: weighted sampling by keys, Efraimidis and Spirakis 2006, doi:10.1016/j.ipl.2005.11.003.
        """
        chances = self._chances()  # [K]
        kind_of = self._answers.kind_of
        weights = np.maximum(self._config.min_weight, chances).take(kind_of)  # [N]
        uniform = _uniform(f"{self.seed}/curriculum/{self._num_draws}", len(self.prompts))  # [N]
        places = largest_keys(uniform, weights, min(count, len(self.prompts)))
        self._num_draws += 1
        self._expected = math.fsum(chances[kind_of[places]]) / max(1, len(places))
        return [self.prompts[place] for place in places]

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """Count the answers of a step; those whose verifier broke do not count."""
        for group in groups:
            parts = [r.components.get(self._config.component) for r in group.rollouts]
            values = [part.value for part in parts if part is not None and part.value is not None]
            right, wrong = self._answers[group.prompt.prompt_id]
            num_right, memory = sum(value == 1.0 for value in values), self._config.memory
            if values:
                counts = (memory * right + num_right, memory * wrong + len(values) - num_right)
                self._answers.set(group.prompt.prompt_id, counts)

    def metrics(self) -> dict[str, float]:
        """Share of prompts that were measured, and the share of the last draw's groups that should teach something."""
        return {
            "curriculum/measured_frac": len(self._answers) / len(self.prompts),
            "curriculum/expected_signal_frac": self._expected,
        }

    def state(self) -> dict[str, Any]:
        return {**super().state(), "num_draws": self._num_draws, "answers": self._answers.state()}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._num_draws = state["num_draws"]
        self._answers.restore(state["answers"])

    def _chances(self) -> NDArray[np.float64]:
        """[K]: that a group teaches, by the kind of its prompt."""
        right, wrong = self._answers.totals()
        prior_right = self._config.prior_weight * (right + 1) / (right + wrong + 2)
        prior_wrong = self._config.prior_weight - prior_right
        own_right, own_wrong = self._answers.kinds()
        return signal_chance(prior_right + own_right, prior_wrong + own_wrong, self._group_size)


def largest_keys(uniform: NDArray[np.float64], weights: NDArray[np.float64], count: int) -> list[int]:
    """Places of the `count` largest keys log(1 - u) / w, the largest first.

    Only keys that can be among them are computed, by the C library's log, so that the draw of a seed does not depend
    on numpy's, whose last bit is another on other CPUs. As -log(1 - u) >= u, no key is above -u / w; the limit is
    where 2 count keys are expected.

    Args:
        uniform: u [N] in [0, 1).
        weights: w [N] > 0.
        count: at most N.
    """
    bounds = uniform / weights  # [N]
    limit = 2 * count / weights.sum()
    while True:
        near = np.flatnonzero(bounds <= limit)
        pairs = zip(uniform[near].tolist(), weights[near].tolist(), strict=True)
        keys = [math.log(1.0 - u) / weight for u, weight in pairs]
        # Other keys are at most -limit, but for rounding: by far less than a thousandth.
        if len(near) == len(uniform) or sum(key > -0.999 * limit for key in keys) >= count:
            return [int(near[i]) for i in heapq.nlargest(count, range(len(keys)), key=keys.__getitem__)]
        limit *= 2


def _uniform(seed: str, count: int) -> NDArray[np.float64]:
    """[count]: the next values of `random.Random(seed).random()`, by numpy's generator of the same name."""
    _, key, _ = random.Random(seed).getstate()
    generator = np.random.RandomState()
    generator.set_state(("MT19937", np.array(key[:-1], np.uint32), key[-1], 0, 0.0))
    return generator.random_sample(count)
