"""Greedy and sampled answers to held-out prompts, scored by the run's rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rlbench.engine.interface import Engine
from rlbench.records import Prompt, RolloutGroup, SamplingParams
from rlbench.rollouts.collect import Scoring, make_groups, sample_completions
from rlbench.rollouts.score import Scorer
from rlbench.tracking.intervals import wilson_interval
from rlbench.tracking.pass_rates import pass_at_k, share_interval

ACCURACY = "accuracy"  # the reward component that counts right answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Outcome of one evaluation; `is_correct` is empty if the run has no component named accuracy."""

    step: int
    is_correct: Mapping[str, bool]  # by prompt_id; a problem whose verifier broke is absent
    metrics: Mapping[str, float]

    @property
    def num_correct(self) -> int:
        return sum(self.is_correct.values())


def evaluate(
    prompts: Sequence[Prompt], engine: Engine, sampling: SamplingParams, tokenizer: Any, scorer: Scorer, *, step: int
) -> tuple[Evaluation, list[RolloutGroup]]:
    """Answer every prompt once.

    Args:
        prompts: held out.
        engine: with the adapter to evaluate.
        sampling: greedy.
        tokenizer: of the model.
        scorer: the run's rewards.
        step: optimizer steps applied so far.
    """
    scoring = Scoring(prompts, tokenizer, scorer, group_size=1)
    completions = sample_completions(
        prompts, engine, sampling, group_size=1, run_seed=0, step=step, on_finished=scoring.take
    )
    groups = make_groups(completions, scoring, step=step)
    rollouts = [group.rollouts[0] for group in groups]
    is_correct = {
        rollout.prompt.prompt_id: rollout.components[ACCURACY].value == 1.0
        for rollout in rollouts
        if ACCURACY in rollout.components and rollout.components[ACCURACY].value is not None
    }
    metrics = _metrics(groups, is_correct)
    return Evaluation(step=step, is_correct=is_correct, metrics=metrics), groups


def sampled_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Accuracy of sampled answers and pass@k, k of them a problem, with 95% intervals.

    A problem with an answer whose verifier broke is left out. Empty without a component named accuracy.
    """
    k = len(groups[0].rollouts)
    found = [[r.components[ACCURACY].value for r in g.rollouts if ACCURACY in r.components] for g in groups]
    counts = [sum(value == 1.0 for value in values) for values in found if len(values) == k and None not in values]
    metrics: dict[str, float] = {}
    for name, draws in {"eval/sampled_accuracy": 1, f"eval/pass_at_{k}": k}.items() if counts else ():
        rates = [pass_at_k(k, count, draws) for count in counts]
        low, high = share_interval(rates, k // draws)
        metrics |= {name: fmean(rates), f"{name}_low": low, f"{name}_high": high}
    return metrics


def _metrics(groups: Sequence[RolloutGroup], is_correct: Mapping[str, bool]) -> dict[str, float]:
    rollouts = [group.rollouts[0] for group in groups]
    metrics = {"eval/num": float(len(rollouts))}
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    if rewards:
        metrics["eval/reward"] = fmean(rewards)
    for name in rollouts[0].components if rollouts else ():
        values = [v for r in rollouts if (v := r.components[name].value) is not None]
        if values:
            metrics[f"eval/{name}"] = fmean(values)
    metrics["eval/length_tokens_mean"] = fmean(len(rollout.completion.token_ids) for rollout in rollouts)
    if is_correct:
        low, high = wilson_interval(sum(is_correct.values()), len(is_correct))
        metrics |= {"eval/accuracy_low": low, "eval/accuracy_high": high}
    return metrics
