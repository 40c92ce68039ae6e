"""Rewards as they were recorded, for rollouts that were recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from rlbench.config.schema import RewardsConfig
from rlbench.engine.recorded_engine import RecordedEngine
from rlbench.records import Completion, Prompt, RewardComponent
from rlbench.rollouts.score import Scorer, reward_terms
from rlbench_rewards.submission import Submission

_MADE_BY = ("path", "kwargs")  # of a component: what its values come from


class RecordedScorer(Scorer):
    """Components from the record, found by a completion's seed; weights and `rewards.combine` are the config's."""

    def __init__(self, config: RewardsConfig, engine: RecordedEngine) -> None:
        self._config, self._engine = config, engine
        self._terms = reward_terms(config)

    @property
    def notes(self) -> list[str]:
        """None: no reward is built."""
        return []

    def begin(self, num_completions: int) -> None:
        """Nothing is computed."""

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        texts: Sequence[Sequence[str]],
        begun: Submission | None = None,
    ) -> list[list[dict[str, RewardComponent]]]:
        """
        Raises:
            ValueError: a configured component was not recorded.
        """
        return [[self._recorded(completion.seed) for completion in group] for group in completions]

    def _recorded(self, seed: int) -> dict[str, RewardComponent]:
        rollout = self._engine.rollout(seed)
        for name in self._terms:
            if name not in rollout.components:
                raise ValueError(
                    f"rewards.components has {name}, but rollout {rollout.rollout_id} was recorded with "
                    f"{', '.join(rollout.components)}; expected the rewards of engine.recorded_from, or a rescore"
                )
        return {name: replace(rollout.components[name], weight=term.weight) for name, term in self._terms.items()}

    def metrics(self) -> dict[str, float]:
        """No worker has run."""
        return {}

    def close(self) -> None:
        """Nothing runs."""


def check_recorded_rewards(config: RewardsConfig, run_folder: Path) -> None:
    """
    Args:
        config: of this run.
        run_folder: of the run that was recorded.

    Raises:
        ValueError: a component is another one there, whose values would stand for it.
    """
    saved = run_folder / "config.yaml"
    theirs = yaml.safe_load(saved.read_text())["rewards"]["components"] if saved.is_file() else {}
    for name, component in config.components.items():
        for part in _MADE_BY if name in theirs else ():
            found, recorded = getattr(component, part), theirs[name][part]
            if found != recorded:
                raise ValueError(
                    f"rewards.components.{name}.{part} is {found}, but engine.recorded_from was recorded with "
                    f"{recorded}; expected the same, or another name, or a rescore"
                )
