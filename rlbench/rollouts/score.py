"""Rewards of completions, computed in the worker processes of `rlbench_rewards`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlbench.config.schema import RewardsConfig
from rlbench.records import FINISH_LENGTH, Completion, Prompt, RewardComponent
from rlbench_rewards import RewardPool, RewardSample


class Scorer:
    """The configured rewards behind one call. A component without a value leaves the rollout without a reward."""

    def __init__(self, config: RewardsConfig) -> None:
        """Start the worker processes.

        Raises:
            ValueError: no component is configured, or one cannot be built.
        """
        if not config.components:
            raise ValueError("rewards.components is empty, expected at least one reward")
        self._weights = {name: component.weight for name, component in config.components.items()}
        self._pool = RewardPool(
            [
                {"name": name, "path": component.path, "kwargs": dict(component.kwargs)}
                for name, component in config.components.items()
            ],
            num_workers=config.num_workers or 1,
            timeout_s=config.timeout_s,
            allowed_prefixes=config.allowed_prefixes,
        )

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        texts: Sequence[Sequence[str]],
    ) -> list[list[dict[str, RewardComponent]]]:
        """Components by name for each completion of each prompt."""
        samples = [
            RewardSample(
                prompt=prompt.text,
                completion=text,
                prompt_id=prompt.prompt_id,
                is_truncated=completion.finish_reason == FINISH_LENGTH,
                columns=dict(prompt.columns),
            )
            for prompt, group, group_texts in zip(prompts, completions, texts, strict=True)
            for completion, text in zip(group, group_texts, strict=True)
        ]
        outcomes = iter(self._pool.score(samples))
        return [
            [
                {
                    name: RewardComponent(
                        status=outcome.status,
                        value=outcome.value,
                        weight=self._weights[name],
                        message=outcome.message,
                        details=outcome.details,
                    )
                    for name, outcome in next(outcomes).items()
                }
                for _ in group
            ]
            for group in completions
        ]

    def total(self, components: Mapping[str, RewardComponent]) -> float | None:
        """Weighted sum, or None if a component has no value."""
        values = [component.value for component in components.values()]
        if any(value is None for value in values):
            return None
        return sum(c.weight * c.value for c in components.values() if c.value is not None)

    def close(self) -> None:
        self._pool.close()
