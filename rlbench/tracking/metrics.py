"""Metric keys, what each means, and the metrics of a step's rollouts.

Keys are stable: sweeps, reports and users' scripts read them. `step` counts optimizer steps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rlbench.records import Rollout, RolloutGroup
from rlbench.tracking.intervals import wilson_interval

__all__ = [
    "METRICS",
    "RESERVED_COMPONENT_NAMES",
    "MetricSpec",
    "component_names",
    "has_no_signal",
    "metric_spec",
    "summarise_rollouts",
    "wilson_interval",
]

SIGNAL_TOLERANCE = 1e-9  # weighted sums of equal components differ by rounding only


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """How a metric is shown.

    Example:
        MetricSpec("mean reward", "", "higher", ".3f")
    """

    label: str  # in words, for axes and summaries
    unit: str  # "" for none
    better: str  # "higher", "lower" or "neither"
    format: str  # Python format specification


def _share(label: str, better: str = "neither") -> MetricSpec:
    return MetricSpec(label, "share", better, ".3f")


METRICS: dict[str, MetricSpec] = {
    "reward/mean": MetricSpec("mean reward", "", "higher", ".3f"),
    "reward/std": MetricSpec("standard deviation of rewards", "", "neither", ".3f"),
    "reward/error_frac": _share("rollouts whose verifier broke", "lower"),
    "reward/timeout_frac": _share("rollouts whose verifier timed out", "lower"),
    "accuracy/train": _share("accuracy on training prompts", "higher"),
    "eval/accuracy": _share("accuracy on held-out problems", "higher"),
    "completion/length_tokens_mean": MetricSpec("mean completion length", "tokens", "neither", ".1f"),
    "completion/length_tokens_min": MetricSpec("shortest completion", "tokens", "neither", ".0f"),
    "completion/length_tokens_max": MetricSpec("longest completion", "tokens", "neither", ".0f"),
    "completion/truncated_frac": _share("completions cut at the token limit", "lower"),
    "completion/num_tokens": MetricSpec("completion tokens", "tokens", "neither", ".0f"),
    "groups/num": MetricSpec("groups", "", "neither", ".0f"),
    "groups/no_signal_frac": _share("groups without a training signal", "lower"),
    "loss/policy": MetricSpec("policy loss", "", "neither", ".4f"),
    "loss/nll": MetricSpec("negative log-likelihood of given completions", "nats/token", "lower", ".4f"),
    "loss/preference": MetricSpec("preference loss", "", "lower", ".4f"),
    "preference/margin": MetricSpec("log ratio of chosen less that of rejected", "nats", "higher", ".4f"),
    "preference/accuracy": _share("rows whose completions are told apart", "higher"),
    "loss/reward_model": MetricSpec("reward-model loss", "", "lower", ".4f"),
    "reward_model/margin": MetricSpec("score of chosen less that of rejected", "", "higher", ".4f"),
    "reward_model/accuracy": _share("pairs whose chosen completion scores higher", "higher"),
    "loss/clip_frac": _share("loss tokens whose gradient the clip removed"),
    "kl/reference": MetricSpec("KL to the reference policy", "nats/token", "neither", ".4f"),
    "kl/teacher": MetricSpec("KL to the teacher", "nats/token", "lower", ".4f"),
    "support/outside_mass_mean": _share("probability outside of what truncated sampling kept"),
    "drift/ess_frac": _share("effective sample size of the importance ratios", "higher"),
    "drift/level": MetricSpec("drift: 0 ok, 1 warn, 2 correct, 3 stop", "", "lower", ".0f"),
    "identity/adapter_effect_mean": MetricSpec("effect of the adapter on logprobs", "nats", "neither", ".4f"),
    "policy/entropy": MetricSpec("entropy of the policy", "nats/token", "neither", ".3f"),
    "optim/grad_norm": MetricSpec("gradient norm before clipping", "", "neither", ".3f"),
    "optim/lr": MetricSpec("learning rate", "", "neither", ".1e"),
    "tokens/generation_per_s": MetricSpec("generated tokens a second", "tokens/s", "higher", ".0f"),
    "tokens/training_per_s": MetricSpec("trained tokens a second", "tokens/s", "higher", ".0f"),
    "time/step_s": MetricSpec("time of a step", "s", "lower", ".1f"),
    "memory/peak_gib": MetricSpec("highest memory of a step", "GiB", "lower", ".2f"),
}

_FAMILIES: dict[str, MetricSpec] = {
    "reward/": MetricSpec("reward component {name}", "", "higher", ".3f"),
    "time/": MetricSpec("time in {name}", "s", "lower", ".1f"),
    "memory/": MetricSpec("highest memory in {name}", "GiB", "lower", ".2f"),
    "drift/": MetricSpec("drift {name}", "", "lower", ".4f"),
    "replay/": MetricSpec("replayed successes: {name}", "", "neither", ".4g"),
    "identity/": MetricSpec("policy identity {name}", "", "lower", ".4f"),
    "eval/": MetricSpec("evaluation {name}", "", "neither", ".3f"),
}


_UNITS = {"time/": "_s", "memory/": "_gib"}  # that end the names of a family's keys
RESERVED_COMPONENT_NAMES = tuple(key.removeprefix("reward/") for key in METRICS if key.startswith("reward/"))


def metric_spec(key: str) -> MetricSpec:
    """The key's own line of METRICS, else its family's (`reward/<name>`, `time/<phase>_s`), else a plain one."""
    if key in METRICS:
        return METRICS[key]
    for prefix, spec in _FAMILIES.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix).removesuffix(_UNITS.get(prefix, ""))
            return MetricSpec(spec.label.format(name=name), spec.unit, spec.better, spec.format)
    return MetricSpec(key, "", "neither", ".4g")


def component_names(keys: Iterable[str]) -> list[str]:
    """Reward components among metric keys, in order: every `reward/<name>` that is no metric of its own."""
    return [key.removeprefix("reward/") for key in keys if key.startswith("reward/") and key not in METRICS]


def has_no_signal(group: RolloutGroup) -> bool:
    """Whether the group's rewards say nothing about which completion is better: all equal, or fewer than 2."""
    rewards = group.rewards
    return len(rewards) < 2 or max(rewards) - min(rewards) <= SIGNAL_TOLERANCE


def summarise_rollouts(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Metrics of one step's rollouts, keys as in METRICS.

    `reward/mean` and `reward/std` (population) are over rollouts that have a reward, `reward/<name>` over rollouts
    whose component has a value. The shares of errors and timeouts are over all rollouts; a rollout with both counts
    in both. `accuracy/train` is `reward/accuracy`, where a component of that name exists. A key without any
    observation is absent, never 0 or nan.

    Raises:
        ValueError: if a reward component is named like a metric of the whole reward (RESERVED_COMPONENT_NAMES).
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    metrics: dict[str, float] = {"groups/num": float(len(groups))}
    if groups:
        metrics["groups/no_signal_frac"] = _mean([has_no_signal(group) for group in groups])
    metrics |= _reward_metrics(rollouts) | _component_metrics(rollouts) | _completion_metrics(rollouts)
    if "reward/accuracy" in metrics:
        metrics["accuracy/train"] = metrics["reward/accuracy"]
    return metrics


def _reward_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    if not rewards:
        return {}
    mean = _mean(rewards)
    return {"reward/mean": mean, "reward/std": math.sqrt(_mean([(r - mean) ** 2 for r in rewards]))}


def _component_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    if not rollouts:
        return {}
    values: defaultdict[str, list[float]] = defaultdict(list)
    for name, value in _component_values(rollouts):
        values[name].append(value)
    if taken := [name for name in values if name in RESERVED_COMPONENT_NAMES]:
        raise ValueError(f"a reward may not be named {taken[0]!r}: reward/{taken[0]} is a metric of the whole reward")
    statuses = [{component.status for component in rollout.components.values()} for rollout in rollouts]
    shares = {f"reward/{kind}_frac": _mean([kind in found for found in statuses]) for kind in ("error", "timeout")}
    return {f"reward/{name}": _mean(found) for name, found in values.items()} | shares


def _component_values(rollouts: Sequence[Rollout]) -> Iterator[tuple[str, float]]:
    for rollout in rollouts:
        for name, component in rollout.components.items():
            if component.value is not None:
                yield name, component.value


def _completion_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
    if not lengths:
        return {"completion/num_tokens": 0.0}
    truncated = [rollout.completion.finish_reason == "length" for rollout in rollouts]
    return {
        "completion/length_tokens_mean": _mean(lengths),
        "completion/length_tokens_min": float(min(lengths)),
        "completion/length_tokens_max": float(max(lengths)),
        "completion/truncated_frac": _mean(truncated),
        "completion/num_tokens": float(sum(lengths)),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
