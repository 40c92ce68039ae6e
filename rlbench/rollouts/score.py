"""Rewards of completions, computed in the worker processes of `rlbench_rewards`; reward models in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

from rlbench import progress
from rlbench.config.schema import RewardsConfig
from rlbench.config.trained_reward import is_trained
from rlbench.records import FINISH_LENGTH, Completion, Prompt, RewardComponent
from rlbench_rewards import RewardOutcome, RewardPool, RewardSample
from rlbench_rewards.composition import Scored, Term, compose

_LOOK_EVERY_S = 0.5  # whether workers go on

InProcess = Callable[[Sequence[Prompt], Sequence[Sequence[Completion]]], list[RewardOutcome]]  # one a completion


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
        self._in_process: dict[str, InProcess] = {}
        self._terms = reward_terms(config)
        specs = reward_specs(config)
        self._pool: RewardPool | None = None
        if not specs:
            return
        self._pool = RewardPool(
            specs,
            num_workers=config.num_workers or 1,
            timeout_s=config.timeout_s,
            allowed_prefixes=config.allowed_prefixes,
            columns=columns,
            max_retries=config.max_retries,
            max_pending=config.max_pending,
        )

    def attach(self, name: str, score: InProcess) -> None:
        """Let `score` give the outcomes of the component `name`, a reward model."""
        self._in_process[name] = score

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
        outcomes = iter(self._outcomes(samples, prompts, completions))
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

    def _outcomes(
        self, samples: Sequence[RewardSample], prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[dict[str, RewardOutcome]]:
        """By component, in the order of the config, of each sample."""
        of_pool = self._pool.submit(samples) if self._pool is not None else None
        own = {name: score(prompts, completions) for name, score in self._in_process.items()}
        found = self._wait_for(of_pool) if of_pool is not None else [{} for _ in samples]
        return [
            {name: own[name][i] if name in own else outcomes[name] for name in self._config.components}
            for i, outcomes in enumerate(found)
        ]

    def _wait_for(self, outcomes: Future[list[dict[str, RewardOutcome]]]) -> list[dict[str, RewardOutcome]]:
        assert self._pool is not None
        num_seen = -1
        while wait([outcomes], _LOOK_EVERY_S).not_done:
            if self._pool.stats.num_events != num_seen:
                num_seen = self._pool.stats.num_events
                progress.mark()
        return outcomes.result()

    def totals(self, group: Sequence[Mapping[str, RewardComponent]]) -> list[float | None]:
        """Rewards of one prompt's rollouts, as `rewards.combine` says; None where a component broke."""
        scored = [{name: Scored(c.status, c.value) for name, c in components.items()} for components in group]
        return compose(scored, self._terms, way=self._config.combine, gated_value=self._config.gated_value)

    def metrics(self) -> dict[str, float]:
        """`reward_pool/...`: outcomes, retries, restarts and latencies since the last call."""
        return self._pool.stats.take() if self._pool is not None else {}

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def reward_terms(config: RewardsConfig) -> dict[str, Term]:
    """How each component enters the whole reward, by its name."""
    return {
        name: Term(weight=component.weight, gate_min=component.gate_min)
        for name, component in config.components.items()
    }


def reward_specs(config: RewardsConfig) -> list[dict[str, Any]]:
    """The components as the reward pool takes them: all but reward models."""
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
        if not is_trained(component)
    ]
