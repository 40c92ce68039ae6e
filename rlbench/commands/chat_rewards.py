"""The run's rewards on an answer of a chat: all of them where there is a data row, else those that need none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from rlbench.config.schema import RewardConfig, RunConfig
from rlbench.config.trained_reward import find_trained_rewards, is_trained
from rlbench.records import Completion, Prompt, RewardComponent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlbench.rollouts.score import Scorer

_NOT_A_SUM = "normalised_sum"  # within a group; an answer has none


class ChatRewards:
    """Scores answers; worker processes start with the first answer that they score."""

    def __init__(self, config: RunConfig, frozen_base: Callable[[], PreTrainedModel]) -> None:
        """
        Args:
            config: of the run, derived.
            frozen_base: for reward models.

        Raises:
            ValueError: a reward cannot be built.
        """
        self._config = config
        self._frozen_base = frozen_base
        components = config.rewards.components
        self._without_row = {name: c for name, c in components.items() if not _needs_row(config, name, c)}
        self._scorers: dict[tuple[str, ...], Scorer] = {}

    def line(self, prompt: Prompt, completion: Completion, text: str) -> str:
        """The rewards by component in words; "" if none applies."""
        has_row = bool(prompt.columns)
        components = self._config.rewards.components if has_row else self._without_row
        if not components:
            return ""
        scorer = self._scorer(components)
        ((found,),) = scorer.score([prompt], [[completion]], [[text]])
        (whole,) = scorer.totals([found])
        line = "rewards: " + ", ".join(f"{name} {_value(component)}" for name, component in found.items())
        if not has_row or self._config.rewards.combine == _NOT_A_SUM:
            return line
        return f"{line}; together {'none' if whole is None else f'{whole:.4g}'}"

    def close(self) -> None:
        for scorer in self._scorers.values():
            scorer.close()

    def _scorer(self, components: Mapping[str, RewardConfig]) -> Scorer:
        from rlbench.rollouts.score import Scorer

        key = tuple(components)
        if key not in self._scorers:
            chosen = replace(self._config.rewards, components=dict(components), num_workers=1)
            scorer = self._scorers[key] = Scorer(chosen)
            self._attach_reward_models(scorer, components)
        return self._scorers[key]

    def _attach_reward_models(self, scorer: Scorer, components: Mapping[str, RewardConfig]) -> None:
        if not any(is_trained(component) for component in components.values()):
            return
        from rlbench.rollouts.trained_reward import RewardModelScorer

        base, budget = self._frozen_base(), self._config.training.tokens_per_microbatch or 1
        for name, reward in find_trained_rewards(self._config).items():
            scorer.attach(name, RewardModelScorer(name, base, reward, tokens_per_microbatch=budget).score)


def _needs_row(config: RunConfig, name: str, component: RewardConfig) -> bool:
    """Whether the component compares with a gold answer or reads another column of the data.

    Raises:
        ValueError: it cannot be built at all.
    """
    from rlbench_rewards.loading import load_reward

    if is_trained(component):
        return False
    what = (name, component.path, component.kwargs, config.rewards.allowed_prefixes)
    target = load_reward(*what).target
    if getattr(target, "needs_right_answer", name == "accuracy"):
        return True
    try:
        load_reward(*what, columns=())
    except ValueError:  # it needs a column
        return True
    return False


def _value(component: RewardComponent) -> str:
    if component.value is not None:
        return f"{component.value:.4g}"
    if component.status == "skipped":
        return "does not apply"
    return f"none ({component.status}: {component.message})"
