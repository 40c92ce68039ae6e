"""Prompts become rollout groups: sampled, decoded, scored. Token in, token out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from rlbench.engine.interface import Engine, EngineDeadError, OnFinished, engine_call
from rlbench.records import Completion, Prompt, RewardComponent, Rollout, RolloutGroup, SamplingParams
from rlbench.rollouts.score import Scorer, reward_sample
from rlbench.rollouts.seeds import sampling_seed

Item = TypeVar("Item")


class Scoring:
    """Texts and scores of one batch of completions, begun for each as soon as it is finished."""

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Any, scorer: Scorer, *, group_size: int) -> None:
        """
        Args:
            prompts: of the batch.
            tokenizer: of the model; decoding drops special tokens, the token ids stay as they were sampled.
            scorer: the run's rewards.
            group_size: completions of each prompt.
        """
        self.prompts = prompts
        self.scorer = scorer
        self._tokenizer = tokenizer
        self._group_size = group_size
        self._texts = [""] * (len(prompts) * group_size)
        self._begun = scorer.begin(len(self._texts))

    def take(self, index: int, completion: Completion) -> None:
        """For `Engine.generate`: decode the completion and let the workers score it."""
        self._texts[index] = self._tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        if self._begun is not None:
            prompt = self.prompts[index // self._group_size]
            self._begun.put(index, reward_sample(prompt, completion, self._texts[index]))

    def texts(self) -> list[list[str]]:
        """Of all completions, by prompt."""
        return in_groups(self._texts, self._group_size)

    def components(self, completions: Sequence[Sequence[Completion]]) -> list[list[dict[str, RewardComponent]]]:
        """Wait for the scores of the completions, all of which were taken."""
        return self.scorer.score(self.prompts, completions, self.texts(), self._begun)


def sample_completions(
    prompts: Sequence[Prompt],
    engine: Engine,
    sampling: SamplingParams,
    *,
    group_size: int,
    run_seed: int,
    step: int,
    on_finished: OnFinished | None = None,
) -> list[list[Completion]]:
    """`group_size` completions for each prompt; seeds are counters (see `sampling_seed`)."""
    seeds = [sampling_seed(run_seed, step, prompt.prompt_id, i) for prompt in prompts for i in range(group_size)]
    token_ids = [prompt.token_ids for prompt in prompts for _ in range(group_size)]
    raised: list[Exception] = []

    def take(index: int, completion: Completion) -> None:
        try:
            if on_finished is not None:
                on_finished(index, completion)
        except Exception as error:
            raised.append(error)
            raise

    try:
        with engine_call(engine, "generation"):
            return in_groups(engine.generate(token_ids, sampling, seeds, take), group_size)
    except EngineDeadError:
        if raised:  # no error of the engine
            raise raised[0] from None
        raise


def make_groups(completions: Sequence[Sequence[Completion]], scoring: Scoring, *, step: int) -> list[RolloutGroup]:
    """Rollouts of the completions that `scoring` has taken."""
    scores = scoring.components(completions)
    return [
        RolloutGroup(
            prompt=prompt,
            rollouts=tuple(
                Rollout(
                    rollout_id=f"{step}/{prompt.prompt_id}/{index}",
                    prompt=prompt,
                    completion=completion,
                    completion_text=text,
                    sample_index=index,
                    components=components,
                    reward=reward,
                )
                for index, (completion, text, components, reward) in enumerate(
                    zip(group, group_texts, group_scores, scoring.scorer.totals(group_scores), strict=True)
                )
            ),
        )
        for prompt, group, group_texts, group_scores in zip(
            scoring.prompts, completions, scoring.texts(), scores, strict=True
        )
    ]


def in_groups(flat: Sequence[Item], group_size: int) -> list[list[Item]]:
    """The completions of each prompt."""
    return [list(flat[start : start + group_size]) for start in range(0, len(flat), group_size)]
