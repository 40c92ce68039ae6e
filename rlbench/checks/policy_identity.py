"""Proof that rollouts were sampled from the weights that are about to be trained.

Every step, bit for bit: each completion's version and fingerprint, the engine's adapter against the trainer's, the
base weights against their state at the start; where all weights are trained, those of the engine against the trainer's.
At the first step and every N steps, in nats: logprobs of the same tokens on both sides, as they were sampled, scored
with the adapter (or with all trained weights), scored without it where there is one; and where sampling is truncated,
among the tokens that were left, for the record: at the edge of the truncation a rounding can let a token in or out.

Shapes: N completion tokens of the probe, one sequence after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlbench.checks.engine_copies import AdapterCopies, FullCopies
from rlbench.checks.limits import Gap
from rlbench.checks.trainer_logprobs import pack_sequences, trainer_logprobs, truncated_logprobs
from rlbench.data.packing import Microbatch
from rlbench.engine.interface import Engine, engine_call
from rlbench.models.policy import Policy
from rlbench.models.weights import Weights
from rlbench.records import Completion, Prompt, SamplingParams

ADVICE = "nothing of this step was trained; the last checkpoint is sound"


class PolicyIdentityError(Exception):
    """The engine sampled from other weights than the trainer holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """|engine - trainer| of the same tokens: as they were sampled, scored with the adapter, scored without it."""

    rollouts: Gap
    adapter: Gap  # with all weights trained: scored with those
    base: Gap | None  # None: all weights are trained, so there is no base
    adapter_effect: float | None  # mean |trainer with adapter - trainer without|: what `adapter` could show at all
    num_tokens: int
    truncated: Gap | None = None  # of the logprobs drawn with, where nothing but truncation changed them

    def metrics(self) -> dict[str, float]:
        gaps = {"rollout": self.rollouts, "adapter" if self.base else "weights": self.adapter}
        if self.base is not None:
            gaps["base"] = self.base
        if self.truncated is not None:
            gaps["truncated"] = self.truncated
        metrics = {
            f"identity/{name}_gap_{statistic}": getattr(gap, statistic)
            for name, gap in gaps.items()
            for statistic in ("mean", "p99", "max")
        }
        if self.adapter_effect is not None:
            metrics["identity/adapter_effect_mean"] = self.adapter_effect
        return metrics | {"identity/num_tokens": float(self.num_tokens)}

    def verdict(self, limit: Gap) -> str:
        """Which side moved, in words; empty if every gap is within the limit."""
        is_wrong = [gap is not None and gap.exceeds(limit) for gap in (self.rollouts, self.adapter, self.base)]
        if not any(is_wrong):
            return ""
        _, is_adapter_wrong, is_base_wrong = is_wrong
        if self.base is None and is_adapter_wrong:
            cause = "they disagree when the tokens are scored anew: other weights or other kernels on one side"
        elif is_base_wrong and is_adapter_wrong:
            cause = "they disagree without the adapter too: other base weights or other kernels on one side"
        elif is_base_wrong:
            cause = "they agree with the adapter and not without it: one side does not switch its adapter off"
        elif is_adapter_wrong:
            cause = "they agree without the adapter and not with it: the engine's adapter is not the trainer's"
        else:
            cause = (
                "they agree when the tokens are scored anew, so the weights are right now: the rollouts were sampled "
                "with other weights, or with cached keys and values of an older version"
            )
        scored = (
            f"{self.adapter} scored with the adapter, {self.base} without" if self.base else f"{self.adapter} scored"
        )
        return (
            f"engine and trainer disagree on {self.num_tokens} tokens by (mean / p99 / max nats) {self.rollouts} as "
            f"sampled, {scored}; expected at most {limit}: {cause}"
        )


class PolicyIdentity:
    """The checks of one run; `check` is called once a step, between sampling and training."""

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        base: torch.nn.Module,
        *,
        limit: Gap,
        every_steps: int,
        max_tokens: int,
        sampling: SamplingParams,
    ) -> None:
        """
        Args:
            engine: samples the rollouts.
            policy: is trained.
            base: the trainer's base model.
            limit: most that engine and trainer may disagree; see `rlbench.checks.limits`.
            every_steps: logprobs are compared at the first step checked, then at multiples of this.
            max_tokens: of one comparison, prompts included; at least one sequence is always taken.
            sampling: of the rollouts.
        """
        self._engine, self._policy = engine, policy
        self._limit, self._every_steps, self._max_tokens = limit, every_steps, max_tokens
        self._sampling = sampling
        self._is_full = isinstance(policy.weights(), Weights)
        self._copies = FullCopies(engine, policy) if self._is_full else AdapterCopies(engine, policy, base)
        self._is_first = True

    def record_sync(self, version: int) -> None:
        """Remember what the engine holds after a sync, to name an older version later."""
        self._copies.record_sync(version)

    def check(
        self,
        step: int,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        *,
        policy_version: int,
        fingerprint: str,
    ) -> dict[str, float]:
        """Everything that is due at this step; metrics of the comparison, if there was one.

        Args:
            step: the optimizer step that the completions were sampled for, from 1.
            prompts: of the step.
            completions: of each prompt.
            policy_version: updates that the trainer has applied.
            fingerprint: of the trainer's adapter, or of all its weights.

        Raises:
            PolicyIdentityError: at the first check that fails; says which side moved.
        """
        check_completions((c for group in completions for c in group), policy_version, fingerprint)
        self.check_weights(policy_version)
        if not (self._is_first or step % self._every_steps == 0):
            return {}
        self._is_first = False
        proof = self.compare(prompts, completions)
        if verdict := proof.verdict(self._limit):
            raise PolicyIdentityError(
                f"policy version {policy_version}: {verdict}; {ADVICE}. Only a model whose honest gap is "
                "larger than that of rlbench/checks/limits.py needs a higher checks.identity_limit_scale"
            )
        return proof.metrics()

    def check_weights(self, policy_version: int) -> None:
        """Compare what the engine holds with what the trainer holds, bit for bit."""
        if problem := self._copies.problem(policy_version):
            raise PolicyIdentityError(f"policy version {policy_version}: {problem}; {ADVICE}")

    def compare(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> Proof:
        """Logprobs of a few of the step's completions on both sides."""
        probe = choose_probe(prompts, completions, self._max_tokens)
        prompt_ids = [prompt.token_ids for prompt, _ in probe]
        token_ids = [completion.token_ids for _, completion in probe]
        sampled = _flat(completion.engine_logprobs for _, completion in probe)  # [N]
        with engine_call(self._engine, "scoring"):
            scored = _flat(self._engine.score(prompt_ids, token_ids))  # [N]
            scored_base = None if self._is_full else _flat(self._engine.score(prompt_ids, token_ids, use_adapter=False))
            self._engine.sleep()
        microbatch = pack_sequences(prompt_ids, token_ids, self._policy.device)
        drawn, trained = (
            logprobs.cpu()
            for logprobs in trainer_logprobs(self._policy, microbatch, temperatures=(self._sampling.temperature, 1.0))
        )
        base = None if self._is_full else trainer_logprobs(self._policy, microbatch, use_adapter=False)[0].cpu()
        return Proof(
            rollouts=gap(sampled, drawn),
            adapter=gap(scored, trained),
            base=None if base is None or scored_base is None else gap(scored_base, base),
            adapter_effect=None if base is None else float((trained - base).abs().mean()),
            num_tokens=len(sampled),
            truncated=self._truncated_gap(microbatch, [completion for _, completion in probe]),
        )

    def _truncated_gap(self, microbatch: Microbatch, completions: Sequence[Completion]) -> Gap | None:
        sampling = self._sampling
        if not sampling.is_only_truncated:
            return None
        reported = _flat(completion.sampling_logprobs for completion in completions)
        return gap(reported, truncated_logprobs(self._policy, microbatch, sampling).cpu())


def check_completions(completions: Iterable[Completion], policy_version: int, fingerprint: str) -> None:
    """Compare the version and fingerprint that every completion carries with the trainer's.

    Raises:
        PolicyIdentityError: at the first completion that differs; says which side is behind.
    """
    for completion in completions:
        if completion.policy_version != policy_version:
            raise PolicyIdentityError(
                f"a completion was sampled by policy version {completion.policy_version}, but the trainer is at "
                f"{policy_version}: the last weight sync did not reach the engine; {ADVICE}"
            )
        if completion.adapter_fingerprint != fingerprint:
            raise PolicyIdentityError(
                f"a completion of policy version {policy_version} was sampled with adapter "
                f"{completion.adapter_fingerprint}, but the trainer holds {fingerprint}: other bytes; {ADVICE}"
            )


def choose_probe(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], max_tokens: int
) -> list[tuple[Prompt, Completion]]:
    """Completions of together at most `max_tokens` tokens with their prompts: first ones of all groups, then second.

    If none fits, the shortest.
    """
    pairs = [
        (prompt, group[i])
        for i in range(max(map(len, completions)))
        for prompt, group in zip(prompts, completions, strict=True)
        if i < len(group)
    ]
    chosen, room = [], max_tokens
    for prompt, completion in pairs:
        size = len(prompt.token_ids) + len(completion.token_ids)
        if size <= room:
            chosen.append((prompt, completion))
            room -= size
    return chosen or [min(pairs, key=lambda pair: len(pair[0].token_ids) + len(pair[1].token_ids))]


def gap(engine: Tensor, trainer: Tensor) -> Gap:
    """Mean, 99th percentile and maximum of |engine - trainer|; both float32 [N]."""
    differences = (engine - trainer).abs()
    return Gap(float(differences.mean()), float(differences.quantile(0.99)), float(differences.max()))


def _flat(rows: Iterable[Sequence[float]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float32)
