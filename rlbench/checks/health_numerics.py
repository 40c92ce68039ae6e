"""Health rules on the update itself: finite numbers, gradients, clipping, the engine's logprobs."""

from __future__ import annotations

from rlbench.checks.health_history import PROBLEM, WARNING, Finding, History, is_of_update, now, percent

MIN_STEPS = 8
SPIKE = 10.0  # times the median
DEAD_NORM, DEAD_SHARE = 1e-7, 0.2
CLIPPED = 0.3
DRIFT_SHARE = 0.1
DRIFT_WARN, DRIFT_CORRECT = 1, 2


def non_finite_steps(history: History) -> Finding | None:
    """Steps whose loss or gradient was no finite number; their update is skipped."""
    bad = history.non_finite
    if not bad:
        return None
    keys = sorted({key for row in bad for key in row["non_finite"] if is_of_update(key)})
    steps = ", ".join(str(row.get("step")) for row in bad[:5]) + (", ..." if len(bad) > 5 else "")
    return Finding(
        rule="non_finite_steps",
        severity=PROBLEM,
        title="Steps were skipped because numbers were not finite",
        evidence=f"{len(bad)} of {len(history.train)} steps (step {steps}): {', '.join(keys)}",
        meaning="Such an update would have destroyed the adapter; it was left out. More than a few mean that the run "
        "is at the edge of what its numbers can hold.",
        settings={
            "optim.lr": f"lower{now(history.number('optim.lr'))}",
            "optim.max_grad_norm": f"0.5{now(history.number('optim.max_grad_norm'))}",
            "model.dtype": f"float32{now(history.setting('model.dtype'))}",
        },
    )


def drift_over_limit(history: History) -> Finding | None:
    """The drift gauge reached `correct`, or `warn` in more than DRIFT_SHARE of steps."""
    levels = history.values("drift/level")
    num_warn = sum(level >= DRIFT_WARN for level in levels)
    num_correct = sum(level >= DRIFT_CORRECT for level in levels)
    if not num_correct and num_warn <= DRIFT_SHARE * len(levels):
        return None
    gaps, ess = history.values("drift/logprob_gap_mean"), history.values("drift/ess_frac")
    evidence = f"the gauge stood at warn or higher in {num_warn} of {len(levels)} steps"
    if gaps:
        limit = history.number("checks.drift_warn_nats")
        evidence += f"; the mean gap reached {max(gaps):.3f} nats a token" + (f" (warn: {limit:g})" if limit else "")
    if ess:
        evidence += f"; the effective sample size fell to {percent(min(ess))} of the tokens"
    return Finding(
        rule="drift_over_limit",
        severity=PROBLEM if num_correct else WARNING,
        title="Trainer and engine disagree about the policy",
        evidence=evidence,
        meaning="The rollouts were sampled by a policy that is measurably not the one that is trained; without "
        "importance weights the gradient is biased.",
        settings={
            "algorithm.importance": f"truncate{now(history.setting('algorithm.importance'))}",
            "model.dtype": f"float32 on both sides{now(history.setting('model.dtype'))}",
        },
    )


def gradient_spikes(history: History) -> Finding | None:
    """A gradient norm SPIKE times the median, in steps after the first few."""
    norms = history.column("optim/grad_norm")
    median = history.median("optim/grad_norm")
    if len(history.train) < MIN_STEPS or not median:
        return None
    spikes = [(value, row.get("step")) for value, row in zip(norms, history.train, strict=True)
              if value is not None and value > SPIKE * median]  # fmt: skip
    if not spikes:
        return None
    largest, step = max(spikes, key=lambda item: item[0])
    return Finding(
        rule="gradient_spikes",
        severity=WARNING,
        title="The gradient norm has spikes",
        evidence=f"{len(spikes)} of {len(norms)} steps over {SPIKE:g} times the median of {median:.2g}; the largest is "
        f"{largest:.2g} in step {step}",
        meaning="A few rollouts decide such a step; clipping keeps its size but not its direction.",
        settings={
            "algorithm.prompts_per_step": f"more{now(history.setting('algorithm.prompts_per_step'))}",
            "optim.max_grad_norm": f"lower{now(history.number('optim.max_grad_norm'))}",
        },
    )


def dead_gradient(history: History) -> Finding | None:
    """Updates were made, but in DEAD_SHARE of them the gradient is zero."""
    norms = history.values("optim/grad_norm")
    num_dead = sum(norm < DEAD_NORM for norm in norms)
    if len(norms) < MIN_STEPS // 2 or num_dead < DEAD_SHARE * len(norms):
        return None
    masked = history.mean("rollouts/masked_frac")
    return Finding(
        rule="dead_gradient",
        severity=PROBLEM,
        title="The gradient is zero",
        evidence=f"{num_dead} of {len(norms)} updates had a gradient norm under {DEAD_NORM:g}"
        + (f"; {percent(masked)} of rollouts are masked out" if masked else ""),
        meaning="Nothing that was sampled reaches the adapter: all tokens are masked, weighted with zero or clipped.",
        settings={
            "algorithm.mask_truncated": f"false{now(history.setting('algorithm.mask_truncated'))}",
            "algorithm.importance": f"off, to see if its weights do it{now(history.setting('algorithm.importance'))}",
        },
    )


def clip_share(history: History) -> Finding | None:
    """The clip removes the gradient of more than CLIPPED of tokens in the last quarter."""
    share = history.late("loss/clip_frac")
    if share is None or share <= CLIPPED or len(history.train) < MIN_STEPS:
        return None
    return Finding(
        rule="clip_share",
        severity=WARNING,
        title="The clip removes much of the gradient",
        evidence=f"{percent(share)} of loss tokens in the last {history.num_late} steps had their gradient removed",
        meaning="The policy leaves the trusted range within one batch; what is generated after that is thrown away.",
        settings={
            "algorithm.num_updates": f"fewer{now(history.setting('algorithm.num_updates'))}",
            "algorithm.num_minibatches": f"fewer{now(history.setting('algorithm.num_minibatches'))}",
            "optim.lr": f"lower{now(history.number('optim.lr'))}",
        },
    )
