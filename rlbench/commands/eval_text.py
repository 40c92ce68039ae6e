"""What an evaluation prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlbench.commands.eval_paired import REWARD, Paired
from rlbench.loops.evaluate import ACCURACY, sampled_text
from rlbench.report.comparison import paired_text
from rlbench.tracking.formats import format_duration
from rlbench.tracking.intervals import wilson_interval

if TYPE_CHECKING:
    from rlbench.commands.eval_measure import Measured

_OWN_LINES = ("eval/num", "eval/accuracy", "eval/pass_at", "eval/sampled", "eval/length", "eval/truncated")


def policy_lines(measured: Measured) -> list[str]:
    """One policy's numbers and how its weights are known."""
    side, metrics = measured.side, measured.evaluation.metrics
    lines = [
        side.name,
        f"  weights    {_weights_text(measured)}",
        f"  identity   {_identity_text(measured)}",
        f"  greedy     {_accuracy_text(measured)}",
    ]
    sampled = sampled_text(metrics, measured.inputs.config.evaluation.num_samples)
    if sampled:
        lines.append(f"  sampled    {sampled.removeprefix('sampled answers, ')}")
    means = [
        f"{name.removeprefix('eval/')} {value:.3f}"
        for name, value in metrics.items()
        if not name.startswith(_OWN_LINES)
    ]
    means += [
        f"truncated {100 * metrics['eval/truncated_frac']:.1f}%",
        f"tokens {metrics['eval/length_tokens_mean']:.0f}",
    ]
    lines.append(f"  means      {', '.join(means)}")
    lines.append(f"  verifiers  {_failures_text(measured)}")
    return lines


def paired_lines(policy: Measured, against: Measured, pairs: Sequence[Paired]) -> list[str]:
    """The difference on the same prompts."""
    lines = [f"{policy.side.name} less {against.side.name}, prompt by prompt"]
    for paired in pairs:
        scale, unit = (1.0, "") if paired.what == REWARD else (100.0, " points")
        interval = "no interval: too few prompts"
        if paired.low is not None and paired.high is not None:
            interval = f"95% {scale * paired.low:+.{_decimals(scale)}f} to {scale * paired.high:+.{_decimals(scale)}f}"
        lines.append(
            f"  {paired.what}: {scale * paired.difference:+.{_decimals(scale)}f}{unit} ({interval}); "
            f"{_counts_text(paired, policy, against)}"
        )
    return lines if pairs else [*lines, "  nothing to compare: no prompt has a verdict for both"]


def _counts_text(paired: Paired, policy: Measured, against: Measured) -> str:
    if paired.what == ACCURACY:
        return paired_text(against.evaluation.is_correct, policy.evaluation.is_correct)
    return f"higher on {paired.num_gained}, lower on {paired.num_lost} of {paired.num}, p = {paired.p:.2g}"


def _decimals(scale: float) -> int:
    return 1 if scale == 100.0 else 3


def _weights_text(measured: Measured) -> str:
    side = measured.side
    return (
        f"fingerprint {measured.fingerprint}, step {side.step}, {side.policy_version} updates, of "
        f"{measured.inputs.model.name}"
    )


def _identity_text(measured: Measured) -> str:
    proof = measured.proof
    kind = "weights" if "identity/weights_gap_mean" in proof else "adapter"
    return (
        f"the engine's weights are the trainer's bit for bit, logprobs of {proof['identity/num_tokens']:.0f} tokens "
        f"{proof[f'identity/{kind}_gap_mean']:.2g} nats apart"
    )


def _accuracy_text(measured: Measured) -> str:
    evaluation = measured.evaluation
    correct, total = evaluation.num_correct, len(evaluation.is_correct)
    if not total:
        reward = evaluation.metrics.get("eval/reward")
        return "no answer has a verdict" if reward is None else f"mean reward {reward:.3f} (no reward named {ACCURACY})"
    low, high = wilson_interval(correct, total)
    share = f"{100 * correct / total:.1f}% (95% interval {100 * low:.1f}% to {100 * high:.1f}%)"
    return f"{correct} of {total} right = {share}, in {format_duration(measured.seconds)}"


def _failures_text(measured: Measured) -> str:
    found = measured.failures
    if not found:
        return f"none broke on {len(measured.rollouts)} answers"
    listed = ", ".join(f"{name}: {count} {status}" for (name, status), count in sorted(found.items()))
    return f"{sum(found.values())} broke on {len(measured.rollouts)} answers, left out, not counted as wrong ({listed})"
