"""Sample, score and time an untrained policy with the parts of the run that it stands before."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from rlbench.build import Inputs, Parts, training_sampling
from rlbench.data.packing import num_packed_tokens
from rlbench.data.stream import PromptStream
from rlbench.planner.preflight_numbers import PreflightNumbers
from rlbench.planner.step_work import with_returns, work_on
from rlbench.records import Prompt, RolloutGroup, TrainingSample
from rlbench.rollouts.collect import Scoring, make_groups, sample_completions
from rlbench.training.update import make_minibatches
from rlbench.weight_sync import sync

_REPEAT_BELOW_S = 20.0  # the first update pays for warm-up (compiled kernels, first allocations); one more is timed


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Predicted seconds."""

    phases: dict[str, float]  # of a step, by phase
    run_s: float  # all steps and evaluations
    generation_tokens_per_s: float
    update_tokens: int  # packed tokens of the microbatch that was timed

    @property
    def step_s(self) -> float:
        return sum(self.phases.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    groups: list[RolloutGroup]
    seconds: dict[str, list[float]]  # by phase, of each batch
    num_in_batch: list[int]  # rollouts


def draw_prompts(inputs: Inputs, count: int) -> list[Prompt]:
    """The first prompts that the run would take; fewer if it has fewer."""
    stream = PromptStream(inputs.train.prompts, seed=inputs.config.seed, shuffle=inputs.config.data.shuffle)
    return stream.next(min(count, len(inputs.train.prompts)))


def sample(
    inputs: Inputs,
    parts: Parts,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Sample:
    """Roll out and score the policy as step 0, in batches of the run's prompts_per_step; each is timed."""
    config = inputs.config
    seconds: dict[str, list[float]] = {"generation": [], "rewards": [], "weight sync": []}
    groups: list[RolloutGroup] = []
    sizes: list[int] = []
    with _timed(seconds["weight sync"]):
        sync(parts.policy.weights(), parts.engine, 0)
    size = config.algorithm.prompts_per_step or 1
    for batch in (prompts[start : start + size] for start in range(0, len(prompts), size)):
        scoring = Scoring(batch, inputs.tokenizer, parts.scorer, group_size=samples_per_prompt)
        with _timed(seconds["generation"]):
            completions = sample_completions(
                batch,
                parts.engine,
                training_sampling(inputs),
                group_size=samples_per_prompt,
                run_seed=config.seed,
                step=0,
                on_finished=scoring.take,
            )
        with _timed(seconds["rewards"]):
            groups += make_groups(completions, scoring, step=0)
        sizes.append(len(batch) * samples_per_prompt)
        progress(len(groups))
    return Sample(groups=groups, seconds=seconds, num_in_batch=sizes)


def predict_times(inputs: Inputs, parts: Parts, sampled: Sample, numbers: PreflightNumbers) -> Times:
    """Seconds a step and of the run. The policy is changed: an update of one microbatch is made and timed."""
    config = inputs.config
    wanted = (config.algorithm.prompts_per_step or 1) * (config.algorithm.group_size or 1)
    tokens = [len(r.completion.token_ids) for group in sampled.groups for r in group.rollouts]
    parts.engine.sleep()
    update_s, update_tokens = _update_s(inputs, parts, sampled.groups, numbers)
    # The median of the batches: the first pays for what is compiled, loaded or started once.
    scaled = {name: _scaled(sampled, name, wanted) for name in ("generation", "rewards")}
    phases = {**scaled, "update": update_s, "weight sync": sampled.seconds["weight sync"][0]}
    generation_rate = wanted * fmean(tokens) / scaled["generation"]
    num_steps, every = config.training.num_steps or 0, config.evaluation.every_steps
    num_evaluations = 2 + ((num_steps - 1) // every if every else 0)
    num_held_out = len(inputs.evaluation.prompts) if inputs.evaluation else 0
    evaluation_s = num_evaluations * num_held_out * fmean(tokens) / generation_rate
    return Times(
        phases=phases,
        run_s=num_steps * sum(phases.values()) + evaluation_s,
        generation_tokens_per_s=generation_rate,
        update_tokens=update_tokens,
    )


def _scaled(sampled: Sample, phase: str, num_rollouts: int) -> float:
    """Median seconds of a batch, at the step's number of rollouts."""
    timed = zip(sampled.seconds[phase], sampled.num_in_batch, strict=True)
    return median(seconds * num_rollouts / size for seconds, size in timed)


def _update_s(
    inputs: Inputs, parts: Parts, groups: Sequence[RolloutGroup], numbers: PreflightNumbers
) -> tuple[float, int]:
    """Seconds of a step's updates with the forwards before them, from one microbatch, and its packed tokens."""
    config = inputs.config
    samples = [
        with_returns(_stand_in(group, index, config.algorithm.group_size or 1), config)
        for group in groups[: config.algorithm.prompts_per_step]
        for index in range(min(len(group.rollouts), config.algorithm.group_size or 1))
    ]
    budget = max(config.training.tokens_per_microbatch or 1, *(num_packed_tokens([sample]) for sample in samples))
    minibatches = make_minibatches(
        samples,
        config.algorithm,
        tokens_per_microbatch=budget,
        max_completion_tokens=config.sampling.max_tokens,
        device=parts.policy.device,
    )
    microbatch = minibatches[0].microbatches[0]
    seconds: list[float] = []
    while not seconds or (len(seconds) < 2 and seconds[0] < _REPEAT_BELOW_S):
        seconds.append(work_on(parts, inputs, microbatch).of_batch(config.algorithm))
    num_tokens = len(microbatch.token_ids)
    in_batch = sum(len(mb.token_ids) for minibatch in minibatches for mb in minibatch.microbatches)
    trained_share = 1.0 if config.algorithm.needs_every_sample or numbers.no_signal is None else (
        1.0 - numbers.no_signal.value
    )  # fmt: skip
    return min(seconds) * in_batch / num_tokens * trained_share, num_tokens


def _stand_in(group: RolloutGroup, index: int, group_size: int) -> TrainingSample:
    """The rollout as a training sample with an advantage: without one it would be left out of the forward."""
    completion = group.rollouts[index].completion
    num_tokens = len(completion.token_ids)
    advantage = 1.0 if index % 2 else -1.0
    return TrainingSample(
        group_id=group.prompt.prompt_id,
        prompt_token_ids=group.prompt.token_ids,
        token_ids=completion.token_ids,
        sampling_logprobs=completion.sampling_logprobs,
        plain_logprobs=completion.plain_logprobs,
        advantages=(advantage / group_size,) * num_tokens,
        loss_mask=(True,) * num_tokens,
    )


class _timed:
    """Appends the seconds of its block to a list."""

    def __init__(self, seconds: list[float]) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        self._seconds.append(time.monotonic() - self._start)
