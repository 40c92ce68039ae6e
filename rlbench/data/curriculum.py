"""A curriculum by measured success rates: prompts are drawn in proportion to the chance that they teach something.

A group teaches if it holds right and wrong answers. A prompt's rate of right answers has a Beta distribution: the rate
of all prompts together, counted as `prior_weight` answers, and the prompt's own answers, the older ones for less.

Source: learnability p(1 - p), Foster and Foerster 2025, arXiv:2502.12272; here for whole groups and with the
uncertainty of p.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from typing import Any

from rlbench.config.curriculum import CurriculumConfig
from rlbench.data.stream import PromptStream
from rlbench.records import Prompt, RolloutGroup


def signal_chance(num_right: float, num_wrong: float, group_size: int) -> float:
    """Probability that `group_size` answers are not all right and not all wrong, if p ~ Beta(num_right, num_wrong).

    1 - E[p^G] - E[(1 - p)^G], E[p^G] = prod_{i < G} (a + i) / (a + b + i).

    Args:
        num_right: a > 0.
        num_wrong: b > 0.
        group_size: G, at least 1.
    """
    total = num_right + num_wrong
    all_right = math.prod((num_right + i) / (total + i) for i in range(group_size))
    all_wrong = math.prod((num_wrong + i) / (total + i) for i in range(group_size))
    return max(0.0, 1.0 - all_right - all_wrong)


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
        self._answers: dict[str, tuple[float, float]] = {}  # by prompt_id: right and wrong ones, older ones for less
        self._num_draws = 0
        self._expected = 0.0

    def next(self, count: int) -> list[Prompt]:
        """Up to `count` prompts, without repeats.

        Source: weighted sampling by keys, Efraimidis and Spirakis 2006, doi:10.1016/j.ipl.2005.11.003.
        """
        generator = random.Random(f"{self.seed}/curriculum/{self._num_draws}")
        chances, unmeasured = self._chances()
        weights = [max(self._config.min_weight, chances.get(p.prompt_id, unmeasured)) for p in self.prompts]
        keys = [math.log(1.0 - generator.random()) / weight for weight in weights]
        chosen = [self.prompts[i] for i in heapq.nlargest(count, range(len(keys)), key=keys.__getitem__)]
        self._num_draws += 1
        self._expected = math.fsum(chances.get(p.prompt_id, unmeasured) for p in chosen) / max(1, len(chosen))
        return chosen

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """Count the answers of a step; those whose verifier broke do not count."""
        for group in groups:
            parts = [r.components.get(self._config.component) for r in group.rollouts]
            values = [part.value for part in parts if part is not None and part.value is not None]
            right, wrong = self._answers.get(group.prompt.prompt_id, (0.0, 0.0))
            num_right, memory = sum(value == 1.0 for value in values), self._config.memory
            if values:
                self._answers[group.prompt.prompt_id] = (
                    memory * right + num_right,
                    memory * wrong + len(values) - num_right,
                )

    def metrics(self) -> dict[str, float]:
        """Share of prompts that were measured, and the share of the last draw's groups that should teach something."""
        return {
            "curriculum/measured_frac": len(self._answers) / len(self.prompts),
            "curriculum/expected_signal_frac": self._expected,
        }

    def state(self) -> dict[str, Any]:
        return {**super().state(), "num_draws": self._num_draws, "answers": dict(self._answers)}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._num_draws = state["num_draws"]
        self._answers = {name: (right, wrong) for name, (right, wrong) in state["answers"].items()}

    def _chances(self) -> tuple[dict[str, float], float]:
        """That a group teaches: of measured prompts by prompt_id, and of any other."""
        right = math.fsum(counts[0] for counts in self._answers.values())
        wrong = math.fsum(counts[1] for counts in self._answers.values())
        prior_right = self._config.prior_weight * (right + 1) / (right + wrong + 2)
        prior_wrong = self._config.prior_weight - prior_right
        by_counts = {
            counts: signal_chance(prior_right + counts[0], prior_wrong + counts[1], self._group_size)
            for counts in set(self._answers.values())
        }
        chances = {name: by_counts[counts] for name, counts in self._answers.items()}
        return chances, signal_chance(prior_right, prior_wrong, self._group_size)
