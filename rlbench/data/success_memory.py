"""Replay of successes: a group without a right answer gets one that an earlier policy gave to the same prompt.

A replayed completion stays what it is: tokens, sampling logprobs, policy version, adapter fingerprint and rollout_id
are those of the policy that sampled it. Its logprobs make the importance weights, which `algorithm.importance`
truncates or masks as those of any other token. It takes the place of a fresh completion in the advantages and in the
update only: metrics of rollouts, the curriculum and the files of a step's rollouts hold what was sampled in the step.

Source: AR3PO, Zhang et al. 2025, arXiv:2509.25808 (right answers of earlier steps where a group has none); ExGRPO, Zhan
et al. 2025, arXiv:2510.02245 (advantages over replayed and fresh together, ratio to the policy that sampled). RePO, Li
et al. 2025, arXiv:2506.09340, replays other answers too. LUFFY, Yan et al. 2025, arXiv:2504.14945, shapes weights of
answers whose logprobs are not known; here they are.
"""

from __future__ import annotations

import base64
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlbench.config.replay import ReplayConfig
from rlbench.records import FINISH_LENGTH, Completion, Prompt, RewardComponent, Rollout, RolloutGroup

Totals = Callable[[Sequence[Mapping[str, RewardComponent]]], Sequence[float | None]]  # rewards of one prompt's rollouts


class SuccessMemory:
    """Right answers of earlier steps, the newest of each prompt.

    Example:
        memory.mix(groups, policy_version=12, totals=scorer.totals)  # for the update
        memory.observe(groups, policy_version=13)                    # after it
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        config: ReplayConfig,
        *,
        component_names: Sequence[str],
        keeps_truncated: bool,
    ) -> None:
        """
        Args:
            prompts: of training.
            config: algorithm.replay.
            component_names: of the run's rewards.
            keeps_truncated: whether completions cut at the token limit are trained on.
        """
        self._prompts = {prompt.prompt_id: prompt for prompt in prompts}
        self._config = config
        self._component_names = set(component_names)
        self._keeps_truncated = keeps_truncated
        self._successes: dict[str, list[Rollout]] = {}  # by prompt_id, the prompt answered right last at the end

    def mix(self, groups: Sequence[RolloutGroup], *, policy_version: int, totals: Totals) -> list[RolloutGroup]:
        """The groups to train on: in those without a right answer, successes in place of the last completions.

        A completion's place says nothing about it. A group in which a verifier broke may hold a right answer and is
        left as it is.

        Args:
            groups: of one step, fresh.
            policy_version: that sampled them.
            totals: rewards of a group from its components, as `rewards.combine` says.
        """
        return [self._mixed(group, policy_version, totals) for group in groups]

    def _mixed(self, group: RolloutGroup, policy_version: int, totals: Totals) -> RolloutGroup:
        num_most = min(self._config.num_per_group, len(group.rollouts) - 1)
        if not num_most or not self._is_all_fail(group):
            return group
        found = [
            replace(success, replay_age=policy_version - success.completion.policy_version)
            for success in self._successes.get(group.prompt.prompt_id, [])
            if policy_version - success.completion.policy_version <= self._config.max_age
        ][-num_most:]
        if not found:
            return group
        rollouts = [*group.rollouts[: -len(found)], *found]
        rewards = totals([rollout.components for rollout in rollouts])
        return replace(
            group, rollouts=tuple(replace(r, reward=reward) for r, reward in zip(rollouts, rewards, strict=True))
        )

    def _is_all_fail(self, group: RolloutGroup) -> bool:
        values = [self._value(rollout) for rollout in group.rollouts if rollout.reward is not None]
        return len(values) == len(group.rollouts) and all(value is not None and value != 1.0 for value in values)

    def _value(self, rollout: Rollout) -> float | None:
        part = rollout.components.get(self._config.component)
        return part.value if part is not None else None

    def observe(self, groups: Sequence[RolloutGroup], *, policy_version: int) -> None:
        """Keep the right answers of a step and forget what is too old by now.

        Args:
            groups: as they were sampled.
            policy_version: after the step.
        """
        for group in groups:
            for rollout in group.rollouts:
                if self._value(rollout) == 1.0 and self._is_trainable(rollout):
                    self._keep(rollout)
        self._forget(policy_version)

    def _is_trainable(self, rollout: Rollout) -> bool:
        is_cut = rollout.completion.finish_reason == FINISH_LENGTH
        return rollout.is_comparable and (self._keeps_truncated or not is_cut)

    def _keep(self, rollout: Rollout) -> None:
        """As the newest; the same tokens once, with the newest policy's logprobs."""
        name, tokens = rollout.prompt.prompt_id, rollout.completion.token_ids
        others = [s for s in self._successes.pop(name, []) if s.completion.token_ids != tokens]
        plain = {key: replace(part, details={}) for key, part in rollout.components.items()}
        self._successes[name] = [*others, replace(rollout, components=plain)][-self._config.num_per_group :]

    def _forget(self, policy_version: int) -> None:
        oldest = policy_version - self._config.max_age
        kept = {
            name: young
            for name, successes in self._successes.items()
            if (young := [s for s in successes if s.completion.policy_version >= oldest])
        }
        self._successes = dict(list(kept.items())[-self._config.max_prompts :])

    def metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Of a step's mixed groups: how many completions were replayed, how old they are; and what is kept.

        Args:
            groups: from `mix`.
        """
        ages = [r.replay_age for group in groups for r in group.rollouts if r.replay_age is not None]
        metrics = {
            "replay/num_rollouts": float(len(ages)),
            "replay/groups_frac": sum(bool(replayed(group)) for group in groups) / max(1, len(groups)),
            "replay/num_stored": float(sum(map(len, self._successes.values()))),
        }
        if ages:
            metrics |= {"replay/age_mean": sum(ages) / len(ages), "replay/age_max": float(max(ages))}
        return metrics

    def state(self) -> dict[str, Any]:
        """JSON-able and exact; prompts are left out."""
        return self.state_later()()

    def state_later(self) -> Callable[[], dict[str, Any]]:
        """Gives the `state` of now; packing is left to the call: 30 ms and 8 MB of 1,024 successes of 400 tokens."""
        successes = dict(self._successes)
        return lambda: {name: [_packed(success) for success in kept] for name, kept in successes.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; successes that were scored by other rewards than the run's are forgotten."""
        self._successes = {}
        for name, kept in state.items():
            successes = [_unpacked(entry, self._prompts[name]) for entry in kept if name in self._prompts]
            own = [s for s in successes if s.components.keys() == self._component_names]
            if own:
                self._successes[name] = own


def replayed(group: RolloutGroup) -> list[Rollout]:
    """The group's rollouts that are not of its step."""
    return [rollout for rollout in group.rollouts if rollout.replay_age is not None]


def _packed(success: Rollout) -> dict[str, Any]:
    completion = success.completion
    return {
        "rollout_id": success.rollout_id,
        "sample_index": success.sample_index,
        "text": success.completion_text,
        "reward": success.reward,
        "components": {
            name: {"status": part.status, "value": part.value, "weight": part.weight, "message": part.message}
            for name, part in success.components.items()
        },
        "token_ids": _encoded(array("i", completion.token_ids)),
        "sampling_logprobs": _encoded(array("d", completion.sampling_logprobs)),
        "plain_logprobs": _encoded(array("d", completion.plain_logprobs)),
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
        "policy_version": completion.policy_version,
        "adapter_fingerprint": completion.adapter_fingerprint,
    }


def _unpacked(entry: Mapping[str, Any], prompt: Prompt) -> Rollout:
    completion = Completion(
        token_ids=tuple(_decoded("i", entry["token_ids"])),
        sampling_logprobs=tuple(_decoded("d", entry["sampling_logprobs"])),
        plain_logprobs=tuple(_decoded("d", entry["plain_logprobs"])),
        finish_reason=entry["finish_reason"],
        seed=entry["seed"],
        policy_version=entry["policy_version"],
        adapter_fingerprint=entry["adapter_fingerprint"],
    )
    return Rollout(
        rollout_id=entry["rollout_id"],
        prompt=prompt,
        completion=completion,
        completion_text=entry["text"],
        sample_index=entry["sample_index"],
        components={name: RewardComponent(**part) for name, part in entry["components"].items()},
        reward=entry["reward"],
    )


def _encoded(values: array[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _decoded(kind: str, text: str) -> array[Any]:
    values: array[Any] = array(kind)
    values.frombytes(base64.b64decode(text))
    return values
