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
from rlbench_rewards.submission import Submission

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

    @property
    def notes(self) -> list[str]:
        """What rewards say about themselves, for the user: the sandbox in which programs run."""
        notes = self._pool.notes if self._pool is not None else {}
        return [f"rewards.components.{name}: {note}" for name, note in notes.items()]

    def attach(self, name: str, score: InProcess) -> None:
        """Let `score` give the outcomes of the component `name`, a reward model."""
        self._in_process[name] = score

    def begin(self, num_completions: int) -> Submission | None:
        """To score completions one by one while others are generated; None where that is off or no worker scores."""
        return self._pool.open(num_completions) if self._pool is not None and self._config.overlap else None

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        texts: Sequence[Sequence[str]],
        begun: Submission | None = None,
    ) -> list[list[dict[str, RewardComponent]]]:
        """Components by name for each completion of each prompt.

        Args:
            begun: what `begin` gave, with the samples of all these completions; None: none was given yet.

        Raises:
            RuntimeError: the workers do not start any more.
        """
        outcomes = iter(self._outcomes(prompts, completions, texts, begun))
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
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        texts: Sequence[Sequence[str]],
        begun: Submission | None,
    ) -> list[dict[str, RewardOutcome]]:
        """By component, in the order of the config, of each completion."""
        of_pool = None
        if self._pool is not None and begun is not None:
            self._pool.stats.add_overlapped(begun.busy_s())
            of_pool = begun.close()
        elif self._pool is not None:
            of_pool = self._pool.submit(_samples(prompts, completions, texts))
        own = {name: score(prompts, completions) for name, score in self._in_process.items()}
        found = self._wait_for(of_pool) if of_pool is not None else [{} for group in completions for _ in group]
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
        """`reward_pool/...`: outcomes, retries, restarts, latencies and hidden time since the last call."""
        return self._pool.stats.take() if self._pool is not None else {}

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def reward_sample(prompt: Prompt, completion: Completion, text: str) -> RewardSample:
    """What rewards see of a completion."""
    return RewardSample(
        prompt=prompt.text,
        completion=text,
        prompt_id=prompt.prompt_id,
        is_truncated=completion.finish_reason == FINISH_LENGTH,
        num_tokens=len(completion.token_ids),
        columns=dict(prompt.columns),
    )


def _samples(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], texts: Sequence[Sequence[str]]
) -> list[RewardSample]:
    return [
        reward_sample(prompt, completion, text)
        for prompt, group, group_texts in zip(prompts, completions, texts, strict=True)
        for completion, text in zip(group, group_texts, strict=True)
    ]


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
