"""Load a policy's weights into the engine, prove that they are there, and let it answer the held-out prompts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rlbench.build import Inputs, Parts, build, greedy_sampling, prepare_base, training_sampling, with_prompts
from rlbench.checks.limits import identity_limit
from rlbench.checks.policy_identity import ADVICE, PolicyIdentity, PolicyIdentityError, check_completions
from rlbench.commands.eval_held_out import held_out_prompts
from rlbench.commands.eval_weights import Side
from rlbench.commands.run_step import why_incomparable
from rlbench.config.schema import RunConfig
from rlbench.config.trained_reward import find_trained_rewards
from rlbench.loops.evaluate import Evaluation, evaluate, sample_answers, sampled_metrics, sampled_shares
from rlbench.models.adapter import Adapter
from rlbench.models.policy import Policy
from rlbench.records import FINISH_LENGTH, Rollout, RolloutGroup
from rlbench.tracking.console import RunConsole
from rlbench.training.microbatch_budget import phase_memory
from rlbench.weight_sync import sync

TRUNCATED = "eval/truncated_frac"
_BROKEN = ("error", "timeout")  # status of a component whose verifier failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A policy's answers and what they say."""

    side: Side
    inputs: Inputs  # that it was built from
    fingerprint: str  # of the weights that answered
    evaluation: Evaluation
    groups: list[RolloutGroup]  # greedy answers, one a prompt
    sampled: list[RolloutGroup]  # evaluation.num_samples a prompt; empty: none were asked for
    proof: Mapping[str, float]  # engine against trainer, in nats
    seconds: float

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in (*self.groups, *self.sampled) for rollout in group.rollouts]

    @property
    def failures(self) -> Counter[tuple[str, str]]:
        """How often a verifier broke, by component and status; such an answer is neither right nor wrong."""
        return Counter(
            (name, component.status)
            for rollout in self.rollouts
            for name, component in rollout.components.items()
            if component.status in _BROKEN
        )


def prepare_evaluation(config: RunConfig) -> Inputs:
    """As `rlbench.build.prepare`, of held-out prompts alone.

    Raises:
        ValueError: anything a user can get wrong.
    """
    basis = prepare_base(config)
    find_trained_rewards(config)
    prompts = held_out_prompts(basis)
    return with_prompts(basis, prompts, prompts)


def measure(inputs: Inputs, sides: Sequence[Side], console: RunConsole) -> Iterator[Measured]:
    """Evaluate policies of one base, one after the other: versions of an engine's weights must not fall.

    Args:
        inputs: from `prepare_evaluation`.
        sides: policies that these inputs can load.
        console: shows progress.

    Raises:
        ValueError: weights do not fit, or are not those that their checkpoint names.
        PolicyIdentityError: the engine did not answer with them.
        EngineDeadError, RunMemoryError: the engine failed, or does not fit.
    """
    with console.phase("loading the model"):
        parts = build(inputs)
    try:
        for note in parts.scorer.notes:
            console.note(note)
        identity = _identity(inputs, parts)
        version = -1
        for side in sorted(sides, key=lambda side: (side.checkpoint is not None, side.policy_version)):
            version = max(version + 1, side.policy_version)
            _load(side, parts.policy, inputs.config, console)
            yield _answer(side, inputs, parts, identity, version, console)
    finally:
        console.close()
        parts.close()


def _load(side: Side, policy: Policy, config: RunConfig, console: RunConsole) -> None:
    if side.checkpoint is None:
        weights = policy.weights()
        has_effect = isinstance(weights, Adapter) and any(bool(b.any()) for b in weights.lora_b.values())
        assert not (side.is_base and has_effect), "the base was asked for, but an adapter was loaded"
        return
    try:
        policy.load(side.checkpoint.folder)
    except OSError as error:
        raise ValueError(
            f"{side.checkpoint.folder} cannot be read any more ({error}); a run that goes on removes its older "
            "checkpoints, so try again"
        ) from error
    expected, found = side.checkpoint.state["adapter_fingerprint"], policy.weights().fingerprint()
    why = why_incomparable(side.checkpoint, config)
    if why:
        console.note(f"{side.name}: its fingerprint was {expected}; {why}, so it is {found} here and was not compared")
    elif found != expected:
        raise ValueError(
            f"{side.checkpoint.folder} names weights with fingerprint {expected}, but what was loaded has {found}; "
            "expected the weights that the run saved"
        )


def _identity(inputs: Inputs, parts: Parts) -> PolicyIdentity:
    return PolicyIdentity(
        parts.engine,
        parts.policy,
        parts.base,
        limit=identity_limit(inputs.config),
        every_steps=1,
        max_tokens=inputs.config.checks.identity_tokens or 1,
        # greedy answers report the logprobs of temperature 1
        sampling=replace(greedy_sampling(inputs), temperature=1.0),
    )


def _answer(
    side: Side, inputs: Inputs, parts: Parts, identity: PolicyIdentity, version: int, console: RunConsole
) -> Measured:
    """
    Args:
        version: that the engine gives to these weights.
    """
    assert inputs.evaluation is not None
    start = time.monotonic()
    with console.phase("weight sync"), phase_memory("weight sync"):
        fingerprint = sync(parts.policy.weights(), parts.engine, version)
        identity.record_sync(version)
    with _named(side):
        identity.check_weights(version)
        with console.phase("evaluation"), phase_memory("evaluation"):
            evaluation, groups = evaluate(
                inputs.evaluation.prompts,
                parts.engine,
                greedy_sampling(inputs),
                inputs.tokenizer,
                parts.scorer,
                step=side.step,
                progress=lambda done, total: console.progress("evaluation", done, total, "answers"),
            )
            sampled = _sample(side, inputs, parts, console)
        with console.phase("identity"), phase_memory("identity"):
            completions = [[rollout.completion for rollout in group.rollouts] for group in groups]
            check_completions((r.completion for g in sampled for r in g.rollouts), version, fingerprint)
            prompts = [group.prompt for group in groups]
            proof = identity.check(side.step, prompts, completions, policy_version=version, fingerprint=fingerprint)
    return Measured(
        side=side,
        inputs=inputs,
        fingerprint=fingerprint,
        evaluation=_with_more(evaluation, groups, sampled, inputs.config.evaluation.num_samples),
        groups=groups,
        sampled=sampled,
        proof=proof,
        seconds=time.monotonic() - start,
    )


@contextmanager
def _named(side: Side) -> Iterator[None]:
    """Say whose weights an engine did not answer with; what the checks advise is for a run that trains."""
    try:
        yield
    except PolicyIdentityError as error:
        raise PolicyIdentityError(f"{side.name}: {str(error).replace(f'; {ADVICE}', '')}") from error


def _sample(side: Side, inputs: Inputs, parts: Parts, console: RunConsole) -> list[RolloutGroup]:
    config = inputs.config
    if inputs.evaluation is None or not config.evaluation.num_samples:
        return []
    return sample_answers(
        inputs.evaluation.prompts,
        parts.engine,
        training_sampling(inputs),
        inputs.tokenizer,
        parts.scorer,
        num_samples=config.evaluation.num_samples,
        run_seed=config.seed,
        step=side.step,
        progress=lambda done, total: console.progress("evaluation", done, total, "sampled answers"),
    )


def _with_more(
    evaluation: Evaluation, groups: Sequence[RolloutGroup], sampled: Sequence[RolloutGroup], num_samples: int
) -> Evaluation:
    """A run's numbers, those of its sampled answers, and the share of answers that were cut at the token limit."""
    ends = [rollout.completion.finish_reason for group in groups for rollout in group.rollouts]
    shares = sampled_shares(sampled)
    metrics = {
        **evaluation.metrics,
        **sampled_metrics(shares, num_samples),
        TRUNCATED: ends.count(FINISH_LENGTH) / len(ends),
    }
    return replace(evaluation, metrics=metrics, sampled=shares)
