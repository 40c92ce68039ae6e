"""Rewards of completions, computed in the worker processes of `rlbench_rewards`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlbench.config.schema import RewardsConfig
from rlbench.records import FINISH_LENGTH, Completion, Prompt, RewardComponent
from rlbench_rewards import RewardPool, RewardSample
from rlbench_rewards.composition import Scored, Term, compose


class Scorer:
    """The configured rewards behind one call. A component without a value leaves the rollout without a reward."""

    def __init__(self, config: RewardsConfig, columns: Sequence[str] | None = None) -> None:
        """Start the worker processes.

        Args:
            config: the `rewards` part of the config.
            columns: names of the data's columns; a reward that needs another one is an error. None: not checked.

        Raises:
            ValueError: no component is configured, or one cannot be built.
        """
        if not config.components:
            raise ValueError("rewards.components is empty, expected at least one reward")
        self._config = config
        self._terms = {
            name: Term(weight=component.weight, gate_min=component.gate_min)
            for name, component in config.components.items()
        }
        self._pool = RewardPool(
            reward_specs(config),
            num_workers=config.num_workers or 1,
            timeout_s=config.timeout_s,
            allowed_prefixes=config.allowed_prefixes,
            columns=columns,
            max_retries=config.max_retries,
            max_pending=config.max_pending,
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
                num_tokens=len(completion.token_ids),
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
                        weight=self._terms[name].weight,
                        message=outcome.message,
                        details=outcome.details,
                    )
                    for name, outcome in next(outcomes).items()
                }
                for _ in group
            ]
            for group in completions
        ]

    def totals(self, group: Sequence[Mapping[str, RewardComponent]]) -> list[float | None]:
        """Rewards of one prompt's rollouts, as `rewards.combine` says; None where a component broke."""
        scored = [{name: Scored(c.status, c.value) for name, c in components.items()} for components in group]
        return compose(scored, self._terms, way=self._config.combine, gated_value=self._config.gated_value)

    def metrics(self) -> dict[str, float]:
        """`reward_pool/...`: outcomes, retries, restarts and latencies since the last call."""
        return self._pool.stats.take()

    def close(self) -> None:
        self._pool.close()


def reward_specs(config: RewardsConfig) -> list[dict[str, Any]]:
    """The components as the reward pool takes them."""
    return [
        {
            "name": name,
            "path": component.path,
            "kwargs": dict(component.kwargs),
            "batch_size": component.batch_size,
            "timeout_s": component.timeout_s,
            "as_messages": component.as_messages,
        }
        for name, component in config.components.items()
    ]
