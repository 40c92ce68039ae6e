"""What is wrong with a run, from its metrics alone: a table of rules, each with evidence and a setting to change.

A rule is a pure function of the `History`; it says nothing where its metrics were not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlbench.checks import health_learning, health_numerics, health_signal
from rlbench.checks.health_history import SEVERITIES, Finding, History

__all__ = ["EXPLAINS", "RULES", "Finding", "find_problems"]

RULES: dict[str, Callable[[History], Finding | None]] = {
    rule.__name__: rule
    for rule in (
        health_numerics.non_finite_steps,
        health_learning.learning_rate_too_high,
        health_learning.reward_without_accuracy,
        health_learning.pays_for_length,
        health_signal.verifier_errors,
        health_learning.entropy_collapse,
        health_numerics.drift_over_limit,
        health_numerics.dead_gradient,
        health_signal.prompts_too_hard,
        health_signal.prompts_too_easy,
        health_signal.no_signal,
        health_signal.truncation,
        health_signal.length_runaway,
        health_signal.equal_completions,
        health_signal.group_too_small,
        health_learning.kl_blow_up,
        health_learning.eval_does_not_follow,
        health_learning.learning_rate_too_low,
        health_numerics.gradient_spikes,
        health_numerics.clip_share,
        health_learning.rise_from_one_component,
        health_signal.evaluation_too_small,
    )
}

# A finding on the left is the cause of those on the right: they are not shown beside it.
EXPLAINS: dict[str, tuple[str, ...]] = {
    "learning_rate_too_high": (
        "non_finite_steps", "kl_blow_up", "gradient_spikes", "clip_share", "entropy_collapse", "length_runaway",
        "truncation", "prompts_too_hard", "no_signal", "equal_completions", "dead_gradient", "rise_from_one_component",
    ),
    "pays_for_length": ("length_runaway", "truncation", "rise_from_one_component", "reward_without_accuracy"),
    "reward_without_accuracy": ("rise_from_one_component", "eval_does_not_follow"),
    "entropy_collapse": ("equal_completions",),
}  # fmt: skip


def find_problems(
    train: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """All findings, worst first; one that another explains is left out.

    Args:
        train: the metrics of each step, in order (`read_metrics(path, "train")`).
        evaluations: of each evaluation, in order (`read_metrics(path, "eval")`).
        config: nested as in config.yaml.
    """
    history = History(train, evaluations, config or {})
    found = {finding.rule: finding for rule in RULES.values() if (finding := rule(history)) is not None}
    explained = {rule for cause in found for rule in EXPLAINS.get(cause, ())}
    shown = [finding for rule, finding in found.items() if rule not in explained]
    return sorted(shown, key=lambda finding: SEVERITIES.index(finding.severity))
