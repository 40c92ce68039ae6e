"""The loop of all online algorithms: prompts, rollouts, credit, packing, update, sync, proof."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlbench.algorithms.entropy_control import EntropyControl
from rlbench.build import Inputs, Parts, greedy_sampling, training_sampling
from rlbench.checks.drift import STOP, WARN, Decision, Drift, DriftError, decide, measure_batch
from rlbench.checks.limits import identity_limit
from rlbench.checks.policy_identity import PolicyIdentity
from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.replay import check_prompts_return
from rlbench.data.curriculum import CurriculumStream
from rlbench.data.packing import Microbatch, num_packed_tokens
from rlbench.data.stream import PromptStream
from rlbench.data.success_memory import SuccessMemory, replayed
from rlbench.engine.interface import engine_call
from rlbench.loops.evaluate import evaluate, sample_answers, sampled_metrics, sampled_shares, sampled_text
from rlbench.loops.training_loop import TrainingLoop
from rlbench.models.policy import Policy
from rlbench.records import Completion, Prompt, RolloutGroup
from rlbench.rollouts.collect import Scoring, make_groups, sample_completions
from rlbench.rollouts.credit import Credit, credit, has_signal
from rlbench.rollouts.pairs import has_pair, pair_up
from rlbench.rollouts.seeds import sampling_seed
from rlbench.tracking.metrics import summarise_rollouts
from rlbench.tracking.rollout_store import write_rollouts
from rlbench.training.checkpoint import Beside
from rlbench.training.optim import learning_rate, set_lr
from rlbench.training.pair_update import PairOptions, make_pair_batches, update_on_pairs
from rlbench.training.reference_kl import reference_kl, refresh_reference
from rlbench.training.support import outside_mass, support_sampler
from rlbench.training.update import Minibatch, UpdateResult, make_minibatches, update_policy
from rlbench.training.value_step import CriticResult, state_values, update_critic
from rlbench.weight_sync import sync


def make_entropy_control(config: AlgorithmConfig) -> EntropyControl:
    if config.entropy_target is None:
        return EntropyControl(coef=config.entropy_coef)
    control = config.entropy_control()
    return EntropyControl(
        coef=config.entropy_coef,
        target=config.entropy_target,
        delta=control["entropy_coef_delta"],
        low=control["entropy_coef_min"],
        high=control["entropy_coef_max"],
    )


@dataclass(slots=True)
class RlLoop(TrainingLoop[Inputs, Parts]):
    """The online loop. Besides what `TrainingLoop.run` says, its steps raise:

    PolicyIdentityError: rollouts did not come from the trained weights.
    DriftError: the trainer's logprobs are too far from the engine's.
    RewardFailure: too many rollouts without a reward.
    EngineDeadError: the engine ended a call with an error of its own.
    """

    stream: PromptStream[Prompt] = field(init=False)
    successes: SuccessMemory | None = field(init=False)  # None: without algorithm.replay
    entropy_control: EntropyControl = field(init=False)
    identity: PolicyIdentity = field(init=False)
    drift: Decision | None = None  # on the last batch that was trained on
    fingerprint: str = ""

    def __post_init__(self) -> None:
        TrainingLoop.__post_init__(self)
        data = self.inputs.config.data
        algorithm = self.inputs.config.algorithm
        if algorithm.curriculum.is_on:
            self.stream = CurriculumStream(
                self.inputs.train.prompts,
                seed=self.inputs.config.seed,
                config=algorithm.curriculum,
                group_size=algorithm.group_size or 2,
            )
        else:
            self.stream = PromptStream(self.inputs.train.prompts, seed=self.inputs.config.seed, shuffle=data.shuffle)
        self.entropy_control = make_entropy_control(self.inputs.config.algorithm)
        config = self.inputs.config
        self.successes = self._success_memory() if algorithm.replay.is_on else None
        self.identity = PolicyIdentity(
            self.parts.engine,
            self.parts.policy,
            self.parts.base,
            limit=identity_limit(config),
            every_steps=config.checks.identity_every_steps or 1,
            max_tokens=config.checks.identity_tokens or 1,
            sampling=training_sampling(self.inputs),
        )

    def _success_memory(self) -> SuccessMemory:
        config, prompts = self.inputs.config, self.inputs.train.prompts
        if not config.algorithm.curriculum.is_on:
            warning = check_prompts_return(config.algorithm, len(prompts), config.training.num_steps or 0)
            if warning:
                self.console.warning(warning)
        return SuccessMemory(
            prompts,
            config.algorithm.replay,
            component_names=list(config.rewards.components),
            keeps_truncated=not config.algorithm.mask_truncated,
        )

    def _begin(self) -> None:
        for note in self.parts.scorer.notes:
            self.console.note(note)
        if self._is_recorded and self.inputs.evaluation is not None:
            self.console.note("engine=recorded answers no held-out problems: evaluation.* does nothing")
        self._sync()

    def _beside(self) -> Beside:
        parts, beside = self.parts, {}
        if parts.critic is not None:
            beside["critic"] = (parts.critic, parts.critic_optimizer)
        if parts.reference is not None:
            beside["reference"] = (parts.reference, None)
        return beside

    def _state(self) -> dict[str, Any]:
        successes = {"successes": self.successes.state_later()} if self.successes is not None else {}
        return {"stream": self.stream.state(), "entropy_control": self.entropy_control.state(), **successes}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.stream.restore(state["stream"])
        self.entropy_control.restore(state["entropy_control"])
        if self.successes is not None:
            self.successes.restore(state.get("successes", {}))

    def _step(self, num_steps: int) -> None:
        start = time.monotonic()
        self._seconds = {}
        step = self.step + 1
        groups, num_refills, proof = self._collect(step)
        metrics: dict[str, float | None] = {**summarise_rollouts(groups), **self.parts.scorer.metrics(), **proof}
        if self.inputs.config.algorithm.max_refills:
            metrics["groups/num_refills"] = float(num_refills)
        if isinstance(self.stream, CurriculumStream):
            metrics |= self.stream.metrics()
            self.stream.observe(groups)
        with engine_call(self.parts.engine, "going to sleep"):
            self.parts.engine.sleep()
        trained = self._mixed(groups)
        if self.successes is not None:
            metrics |= self.successes.metrics(trained)
        credited = self._credit(trained)
        metrics["rollouts/invalid_frac"] = credited.num_invalid_rollouts / sum(len(g.rollouts) for g in groups)
        metrics |= credited.metrics
        metrics |= self._update(credited, step, num_steps)
        if self.successes is not None:
            self.successes.observe(groups, policy_version=self.policy_version)
        self._refresh_reference(step)
        with engine_call(self.parts.engine, "waking up"):
            self.parts.engine.wake()
        self._sync()
        self.step = step
        self._record(step, num_steps, groups, trained, credited, metrics, start)

    def _mixed(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """What is trained on: with algorithm.replay, successes of earlier steps in groups without one."""
        if self.successes is None:
            return list(groups)
        return self.successes.mix(groups, policy_version=self.policy_version, totals=self.parts.scorer.totals)

    def _collect(self, step: int) -> tuple[list[RolloutGroup], int, dict[str, float]]:
        """The step's groups, the number of refills, and the metrics of the proof that the trained policy sampled them.

        With dynamic sampling, groups without signal are drawn anew.
        """
        config = self.inputs.config.algorithm
        wanted = config.prompts_per_step or 1
        groups, proof = self._sample_groups(self.stream.next(wanted), step)
        for refill in range(config.max_refills):
            num_missing = wanted - sum(self._has_signal(group) for group in groups)
            seen = {group.prompt.prompt_id for group in groups}
            prompts = [p for p in self.stream.next(num_missing) if p.prompt_id not in seen] if num_missing else []
            if not prompts:
                return groups, refill, proof
            more, more_proof = self._sample_groups(prompts, step)
            groups, proof = groups + more, proof | more_proof
        return groups, config.max_refills, proof

    def _has_signal(self, group: RolloutGroup) -> bool:
        config = self.inputs.config
        is_useful = has_pair if config.algorithm.pairs.is_on else has_signal
        (mixed,) = self._mixed([group])
        return is_useful(mixed, config.algorithm, config.rewards, max_completion_tokens=config.sampling.max_tokens)

    def _sample_groups(self, prompts: Sequence[Prompt], step: int) -> tuple[list[RolloutGroup], dict[str, float]]:
        config, parts = self.inputs.config, self.parts
        group_size = config.algorithm.group_size or 2
        scoring = Scoring(prompts, self.inputs.tokenizer, parts.scorer, group_size=group_size)
        with self._phase("generation"):
            completions = sample_completions(
                prompts,
                parts.engine,
                training_sampling(self.inputs),
                group_size=group_size,
                run_seed=config.seed,
                step=step,
                on_finished=scoring.take,
            )
        proof = self._prove(step, prompts, completions)
        with self._phase("rewards"):
            return make_groups(completions, scoring, step=step), proof

    def _prove(
        self, step: int, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> dict[str, float]:
        if self._is_recorded:
            return {}
        with self._phase("identity"):
            return self.identity.check(
                step, prompts, completions, policy_version=self.policy_version, fingerprint=self.fingerprint
            )

    def _credit(self, groups: Sequence[RolloutGroup]) -> Credit:
        config = self.inputs.config
        limit = config.sampling.max_tokens
        if config.algorithm.pairs.is_on:
            return pair_up(groups, config.algorithm, config.rewards, max_completion_tokens=limit)
        token_kl = teacher_gaps = None
        if config.algorithm.has_kl_reward:
            with self._phase("reference"):
                token_kl = self._token_kl(groups, config.algorithm.kl, self.parts.reference)
        if config.algorithm.has_teacher:
            with self._phase("teacher"):
                teacher_gaps = self._token_kl(groups, "k1", self.parts.teacher)
        of_states = None
        if self.parts.critic is not None:
            with self._phase("values"):
                of_states = state_values(
                    self.parts.critic,
                    groups,
                    bootstrap_truncated=config.algorithm.critic.bootstrap_truncated,
                    tokens_per_microbatch=self._room_for(groups),
                )
        return credit(
            groups,
            config.algorithm,
            config.rewards,
            max_completion_tokens=limit,
            token_kl=token_kl,
            state_values=of_states,
            teacher_gaps=teacher_gaps,
        )

    def _token_kl(self, groups: Sequence[RolloutGroup], estimator: str, other: Policy | None) -> dict[str, list[float]]:
        """Of the policy to `other` (None: the base) at each token, by rollout_id."""
        config = self.inputs.config
        return reference_kl(
            self.parts.policy,
            groups,
            estimator=estimator,
            reference=other,
            temperature=config.sampling.temperature,
            tokens_per_microbatch=self._room_for(groups),
        )

    def _room_for(self, groups: Sequence[RolloutGroup]) -> int:
        """Tokens of a microbatch that holds any of the rollouts."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        return self.budget.room_for(max(len(r.prompt.token_ids) + len(r.completion.token_ids) for r in rollouts))

    def _update(self, credited: Credit, step: int, num_steps: int) -> dict[str, float | None]:
        """The batch's optimizer steps; none if no group has a signal."""
        config, parts = self.inputs.config, self.parts
        # Steps of the critic's warm-up are no part of the policy's schedule.
        num_warmup = config.algorithm.critic.warmup_steps
        lr = learning_rate(step - num_warmup, num_steps - num_warmup, config.optim) if step > num_warmup else 0.0
        if not credited.has_signal:
            return {"optim/lr": lr, "optim/is_skipped": 1.0}
        if config.algorithm.pairs.is_on:
            return self._update_on_pairs(credited, lr)
        room = self.budget.room_for(max(num_packed_tokens([sample]) for sample in credited.samples))
        minibatches = make_minibatches(
            credited.samples,
            config.algorithm,
            tokens_per_microbatch=room,
            max_completion_tokens=config.sampling.max_tokens,
            device=parts.policy.device,
        )
        of_critic = self._update_critic(minibatches, step, num_steps)
        if step <= num_warmup:
            self._count_updates(0, of_critic.is_finite, of_critic.shown, credited.samples)
            return {"optim/lr": lr, "optim/is_skipped": 0.0, "optim/num_updates": 0.0, **of_critic.metrics}
        set_lr(parts.optimizer, lr)
        with self._phase("update"):
            result = update_policy(
                parts.policy,
                minibatches,
                parts.optimizer,
                config.algorithm,
                temperature=config.sampling.temperature,
                max_grad_norm=config.optim.max_grad_norm,
                entropy_control=self.entropy_control,
                seed=sampling_seed(config.seed, step, "token choice", 0),
                reference=parts.reference,
                budget=self.budget,
                sampler=support_sampler(training_sampling(self.inputs), config.algorithm),
            )
        shown = result.metrics if of_critic.is_finite else of_critic.shown
        self._count_updates(result.num_applied, result.is_finite and of_critic.is_finite, shown, credited.samples)
        microbatches = [microbatch for minibatch in minibatches for microbatch in minibatch.microbatches]
        return self._of_update(result, lr, microbatches) | of_critic.metrics

    def _update_on_pairs(self, credited: Credit, lr: float) -> dict[str, float | None]:
        """The batch's optimizer steps with the preference losses."""
        config, parts = self.inputs.config, self.parts
        batches = make_pair_batches(
            credited.samples,
            credited.pairs,
            num_minibatches=config.algorithm.num_minibatches,
            tokens_per_microbatch=self.budget.room_for(max(num_packed_tokens([s]) for s in credited.samples)),
            device=parts.policy.device,
        )
        options = PairOptions(
            num_updates=config.algorithm.num_updates,
            temperature=config.sampling.temperature,
            max_grad_norm=config.optim.max_grad_norm,
        )
        set_lr(parts.optimizer, lr)
        with self._phase("update"):
            result = update_on_pairs(
                parts.policy,
                batches,
                parts.optimizer,
                config.preference,
                options,
                reference=parts.reference,
                budget=self.budget,
            )
        self._count_updates(result.num_applied, result.is_finite, result.metrics, credited.samples)
        return self._of_update(result, lr, [microbatch for batch in batches for microbatch in batch.microbatches])

    def _of_update(
        self, result: UpdateResult, lr: float, microbatches: Sequence[Microbatch]
    ) -> dict[str, float | None]:
        """Metrics of the policy's updates; the drift is judged."""
        max_ratio = self.inputs.config.checks.drift_max_ratio
        sampling = training_sampling(self.inputs)
        is_truncated = support_sampler(sampling, self.inputs.config.algorithm) is not None
        drift = measure_batch(result.microbatches, result.logprobs, max_ratio=max_ratio, is_truncated=is_truncated)
        has_outside = sampling.is_only_truncated and drift is not None
        return (
            {"optim/lr": lr, "optim/is_skipped": float(not result.num_applied)}
            | {"optim/num_updates": float(result.num_applied)}
            | result.metrics
            | (self._judge(drift) if drift is not None and result.num_applied else {})
            | self._replay_ratios(result)
            | ({"support/outside_mass_mean": outside_mass(result.microbatches)} if has_outside else {})
            | self._sizes(microbatches)
        )

    def _replay_ratios(self, result: UpdateResult) -> dict[str, float]:
        """How far the policy has moved from those that sampled what was replayed; nothing if nothing was."""
        max_ratio = self.inputs.config.checks.drift_max_ratio
        found = measure_batch(result.microbatches, result.logprobs, max_ratio=max_ratio, is_replayed=True)
        if found is None:
            return {}
        names = ("logprob_gap_mean", "ratio_mean", "ratio_max", "ess_frac")
        return {f"replay/{name}": found.metrics[f"drift/{name}"] for name in names}

    def _update_critic(self, minibatches: Sequence[Minibatch], step: int, num_steps: int) -> CriticResult:
        """The critic's optimizer steps, at the same place of the schedule as the policy's; nothing without a critic."""
        config, critic, optimizer = self.inputs.config, self.parts.critic, self.parts.critic_optimizer
        if critic is None or optimizer is None:
            return CriticResult(is_finite=True, metrics={})
        of_critic = config.algorithm.critic
        lr_of_step = learning_rate(step, num_steps, replace(config.optim, lr=of_critic.lr))
        set_lr(optimizer, lr_of_step)
        with self._phase("critic update"):
            return update_critic(
                critic,
                minibatches,
                optimizer,
                num_updates=config.algorithm.num_updates,
                clip_value=of_critic.clip_value,
                max_grad_norm=config.optim.max_grad_norm,
                budget=self.budget,
            )

    def _refresh_reference(self, step: int) -> None:
        config, reference = self.inputs.config.algorithm, self.parts.reference
        if reference is not None and config.reference_refresh_steps and step % config.reference_refresh_steps == 0:
            self._note_change()
            refresh_reference(reference, self.parts.policy, config.refresh_frac)

    def _judge(self, drift: Drift) -> dict[str, float]:
        """Metrics of the drift; warns once for each climb of the ladder."""
        decision = decide(drift, self.inputs.config.checks)
        if decision.level == STOP:
            raise DriftError(decision.reason)
        if decision.level >= WARN and (self.drift is None or decision.level > self.drift.level):
            self.console.warning(f"step {self.step + 1}: {decision.reason}")
        self.drift = decision
        return drift.metrics | {"drift/level": float(decision.level)}

    def _sync(self) -> None:
        with self._phase("weight sync"):
            self.fingerprint = sync(self.parts.policy.weights(), self.parts.engine, self.policy_version)
            self.identity.record_sync(self.policy_version)

    def _record(
        self,
        step: int,
        num_steps: int,
        groups: Sequence[RolloutGroup],
        trained: Sequence[RolloutGroup],
        credited: Credit,
        metrics: dict[str, float | None],
        start: float,
    ) -> None:
        tracking = self.inputs.config.tracking
        metrics["groups/no_signal_frac"] = credited.num_no_signal_groups / len(groups)
        num_generated = metrics.get("completion/num_tokens") or 0.0
        metrics["tokens/generation_per_s"] = num_generated / self._seconds["generation"]
        if tracking.save_rollouts:
            with self._phase("recording"):
                write_rollouts(self.run_folder, step, groups, credited.advantages)
                if self.successes is not None:
                    old = [replace(group, rollouts=tuple(replayed(group))) for group in trained]
                    write_rollouts(self.run_folder, step, old, credited.advantages, phase="replayed")
        self._log_step(step, metrics, start)
        every = tracking.sample_every_steps
        if every and (step == 1 or step % every == 0) and step < num_steps:
            rollout = max(groups[0].rollouts, key=lambda r: r.reward if r.reward is not None else float("-inf"))
            self.console.sample(rollout, step, credited.advantages.get(rollout.rollout_id))

    def _released_bytes(self) -> int:
        return self.parts.engine.released_bytes()

    def _sampled_answers(self) -> dict[str, float]:
        """Shares of evaluation.num_samples answers to each held-out problem that are right."""
        config, parts, prompts = self.inputs.config, self.parts, self.inputs.evaluation
        if prompts is None or not config.evaluation.num_samples:
            return {}
        groups = sample_answers(
            prompts.prompts,
            parts.engine,
            training_sampling(self.inputs),
            self.inputs.tokenizer,
            parts.scorer,
            num_samples=config.evaluation.num_samples,
            run_seed=config.seed,
            step=self.step,
            progress=self._tell_answers,
        )
        return sampled_shares(groups)

    def _tell_answers(self, done: int, total: int) -> None:
        self.console.progress("evaluation", done, total, "answers")

    @property
    def _is_recorded(self) -> bool:
        """Nothing is generated: there are no weights to prove, and no answers to held-out problems."""
        return self.inputs.config.engine.kind == "recorded"

    def _evaluate(self) -> None:
        if self.inputs.evaluation is None or self._is_recorded:
            return
        with self._phase("evaluation"):
            evaluation, groups = evaluate(
                self.inputs.evaluation.prompts,
                self.parts.engine,
                greedy_sampling(self.inputs),
                self.inputs.tokenizer,
                self.parts.scorer,
                step=self.step,
                progress=self._tell_answers,
            )
            shares, num_samples = self._sampled_answers(), self.inputs.config.evaluation.num_samples
            first = self.evaluations[0] if self.evaluations else None
            sampled = sampled_metrics(shares, num_samples, first.sampled if first else None)
            evaluation = replace(evaluation, metrics={**evaluation.metrics, **sampled}, sampled=shares)
        self.parts.scorer.metrics()  # so that the next step's are its own
        if self.inputs.config.tracking.save_rollouts:
            write_rollouts(self.run_folder, self.step, groups, {}, phase="eval")
        self._log_evaluation(evaluation)
        name = f"held-out problems after step {self.step}" if self.step else "held-out problems before training"
        if evaluation.is_correct:
            previous = (first.num_correct, len(first.is_correct)) if first and first.is_correct else None
            self.console.evaluation(name, evaluation.num_correct, len(evaluation.is_correct), previous=previous)
        else:
            self.console.note(
                f"evaluation, {name}: mean reward {evaluation.metrics.get('eval/reward', float('nan')):.3f}"
            )
        if sampled:
            self.console.note(sampled_text(sampled, num_samples))
