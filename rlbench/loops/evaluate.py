"""Greedy and sampled answers to held-out prompts, scored by the run's rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from statistics import fmean
from typing import Any

from rlbench.engine.interface import Engine
from rlbench.records import Completion, Prompt, RolloutGroup, SamplingParams
from rlbench.rollouts.collect import Scoring, make_groups, sample_completions
from rlbench.rollouts.score import Scorer
from rlbench.tracking.intervals import paired_interval, wilson_interval
from rlbench.tracking.pass_rates import pass_at_k, share_interval

ACCURACY = "accuracy"  # the reward component that counts right answers
SAMPLED, SAMPLED_CHANGE = "eval/sampled_accuracy", "eval/sampled_change"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Outcome of one evaluation; `is_correct` is empty if the run has no component named accuracy."""

    step: int
    is_correct: Mapping[str, bool]  # by prompt_id; a problem whose verifier broke is absent
    metrics: Mapping[str, float]
    sampled: Mapping[str, float] = field(default_factory=dict)  # by prompt_id: share of sampled answers that are right

    @property
    def num_correct(self) -> int:
        return sum(self.is_correct.values())


def without_old_answers(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """All of them, those between the first and the last with their metrics alone: checkpoints hold the answers."""
    between = [replace(e, is_correct={}, sampled={}) if e.is_correct or e.sampled else e for e in evaluations[1:-1]]
    return [*evaluations[:1], *between, *evaluations[1:][-1:]]


def evaluate(
    prompts: Sequence[Prompt],
    engine: Engine,
    sampling: SamplingParams,
    tokenizer: Any,
    scorer: Scorer,
    *,
    step: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Evaluation, list[RolloutGroup]]:
    """Answer every prompt once.

    Args:
        prompts: held out.
        engine: with the adapter to evaluate.
        sampling: greedy.
        tokenizer: of the model.
        scorer: the run's rewards.
        step: optimizer steps applied so far.
        progress: told how many of how many answers are finished.
    """
    scoring = Scoring(prompts, tokenizer, scorer, group_size=1)
    completions = sample_completions(
        prompts,
        engine,
        sampling,
        group_size=1,
        run_seed=0,
        step=step,
        on_finished=counted(scoring.take, len(prompts), progress),
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


def sample_answers(
    prompts: Sequence[Prompt],
    engine: Engine,
    sampling: SamplingParams,
    tokenizer: Any,
    scorer: Scorer,
    *,
    num_samples: int,
    run_seed: int,
    step: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[RolloutGroup]:
    """`num_samples` answers to every prompt, drawn as in training; the other arguments are those of `evaluate`."""
    scoring = Scoring(prompts, tokenizer, scorer, group_size=num_samples)
    completions = sample_completions(
        prompts,
        engine,
        sampling,
        group_size=num_samples,
        run_seed=run_seed,
        step=step,
        on_finished=counted(scoring.take, len(prompts) * num_samples, progress),
    )
    return make_groups(completions, scoring, step=step)


def counted(
    take: Callable[[int, Completion], None], total: int, progress: Callable[[int, int], None]
) -> Callable[[int, Completion], None]:
    """`take`, after which `progress` is told how many of the `total` completions it was called with."""
    numbers = count(1)

    def take_and_tell(index: int, completion: Completion) -> None:
        take(index, completion)
        progress(next(numbers), total)

    return take_and_tell


def sampled_shares(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Share of each problem's sampled answers that are right, by prompt_id.

    A problem with an answer whose verifier broke is left out. Empty without a component named accuracy.
    """
    shares = {}
    for group in groups:
        values = [r.components[ACCURACY].value for r in group.rollouts if ACCURACY in r.components]
        if len(values) == len(group.rollouts) and None not in values:
            shares[group.prompt.prompt_id] = fmean(value == 1.0 for value in values)
    return shares


def sampled_metrics(shares: Mapping[str, float], k: int, first: Mapping[str, float] | None = None) -> dict[str, float]:
    """Accuracy of sampled answers and pass@k, with 95% intervals; their change since `first`, by the same problems.

    Args:
        shares: of `sampled_shares`.
        k: answers to each problem.
        first: shares of the first evaluation; None: this is it.
    """
    metrics: dict[str, float] = {}
    for name, draws in {SAMPLED: 1, f"eval/pass_at_{k}": k}.items() if shares else ():
        rates = [pass_at_k(k, round(k * share), draws) for share in shares.values()]
        low, high = share_interval(rates, k // draws)
        metrics |= {name: fmean(rates), f"{name}_low": low, f"{name}_high": high}
    both = [problem for problem in shares if problem in (first or {})]
    if first and len(both) > 1:
        before, after = [first[problem] for problem in both], [shares[problem] for problem in both]
        low, high = paired_interval(before, after)
        change = fmean(after) - fmean(before)
        metrics |= {SAMPLED_CHANGE: change, f"{SAMPLED_CHANGE}_low": low, f"{SAMPLED_CHANGE}_high": high}
    return metrics


def sampled_text(metrics: Mapping[str, float], k: int) -> str:
    """The numbers of `sampled_metrics` as a sentence; "" if there are none."""
    if SAMPLED not in metrics:
        return ""
    share, low, high = (100 * metrics[name] for name in (SAMPLED, f"{SAMPLED}_low", f"{SAMPLED}_high"))
    text = (
        f"sampled answers, {k} to each problem: {share:.1f}% right (95% interval {low:.1f}% to {high:.1f}%), "
        f"pass@{k} {100 * metrics[f'eval/pass_at_{k}']:.1f}%"
    )
    if SAMPLED_CHANGE not in metrics:
        return text
    low, high = 100 * metrics[f"{SAMPLED_CHANGE}_low"], 100 * metrics[f"{SAMPLED_CHANGE}_high"]
    return f"{text}; {100 * metrics[SAMPLED_CHANGE]:+.1f} points (95% {low:+.1f} to {high:+.1f}, on the same problems)"


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
