"""Go or no-go: what in the sample of an untrained policy would waste a run, with the setting to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlbench.config.schema import RunConfig
from rlbench.planner.preflight_numbers import FORMAT, PreflightNumbers
from rlbench.tracking.formats import format_fraction

STOP = "stop"
CAUTION = "caution"

TRUNCATED_STOP = 0.9  # at 0.76 +exp=grpo_gsm8k still learns to end in time
TRUNCATED_CAUTION = 0.25
NO_SIGNAL_STOP = 0.9  # nine of ten groups are generated for nothing
NO_SIGNAL_CAUTION = 0.6
FORMAT_CAUTION = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One reason.

    Example:
        Finding(name="truncation", level="stop", text="91% of the completions ...", advice="sampling.max_tokens=128")
    """

    name: str
    level: str  # STOP or CAUTION
    text: str
    advice: str


def judge(numbers: PreflightNumbers, config: RunConfig) -> list[Finding]:
    """Reasons against the run, those that stop it first; none: go.

    Args:
        numbers: of the sample.
        config: of the run, derived.
    """
    found = [
        *_broken_rewards(numbers, config),
        *_truncation(numbers, config),
        *_signal(numbers, config),
        *_form(numbers),
    ]
    return sorted(found, key=lambda finding: finding.level != STOP)


def is_go(findings: list[Finding]) -> bool:
    return all(finding.level != STOP for finding in findings)


def _broken_rewards(numbers: PreflightNumbers, config: RunConfig) -> Iterator[Finding]:
    if not numbers.invalid_frac:
        return
    rewards, share = config.rewards, format_fraction(numbers.invalid_frac, 1)
    would_stop = rewards.on_invalid == "stop" or numbers.invalid_frac > rewards.max_invalid_frac
    causes = "; ".join(f"{name} ended in {message}" for name, message in numbers.problems.items())
    is_timeout = bool(numbers.problems) and all(m.startswith("timeout") for m in numbers.problems.values())
    cure = f"a larger rewards.timeout_s (now {rewards.timeout_s:g})" if is_timeout else "mend the reward"
    yield Finding(
        name="broken rewards",
        level=STOP if would_stop else CAUTION,
        text=f"{share} of the rollouts got no reward (the run stops above rewards.max_invalid_frac="
        f"{rewards.max_invalid_frac:g}): {causes or 'no component gave a value'}",
        advice=f"{cure}; python -m rlbench reward test shows what it does with the data's own answers",
    )


def _truncation(numbers: PreflightNumbers, config: RunConfig) -> Iterator[Finding]:
    share, limit = numbers.truncated.value, config.sampling.max_tokens
    if share <= TRUNCATED_CAUTION:
        return
    yield Finding(
        name="truncation",
        level=STOP if share > TRUNCATED_STOP else CAUTION,
        text=f"{format_fraction(share)} of the completions are cut at {limit} tokens before they end",
        advice=f"sampling.max_tokens={2 * limit}, or ask for shorter answers in data.system_prompt and data.examples",
    )


def _signal(numbers: PreflightNumbers, config: RunConfig) -> Iterator[Finding]:
    if numbers.invalid_frac == 1:
        return  # said already
    if numbers.num_distinct_rewards == 1:
        yield _constant(numbers)
    elif numbers.no_signal is not None and numbers.no_signal.value > NO_SIGNAL_CAUTION:
        size = numbers.group_size
        refills = "" if config.algorithm.max_refills else " or algorithm.max_refills=3 (draws prompts that have one)"
        yield Finding(
            name="no signal",
            level=STOP if numbers.no_signal.value > NO_SIGNAL_STOP else CAUTION,
            text=f"in {format_fraction(numbers.no_signal.value)} of the groups of {size} all completions would be "
            "rewarded alike and teach nothing",
            advice=f"algorithm.group_size={2 * size}{refills}, or data of another difficulty",
        )


def _constant(numbers: PreflightNumbers) -> Finding:
    reward = numbers.metrics["reward/mean"]
    solved = numbers.pass_at[1].value if numbers.pass_at else None
    if solved == 1 or (solved is None and reward > 0):
        advice = "harder problems (data.path or another data=), or a reward that tells good from better"
    else:
        advice = (
            "a warm start by supervised fine-tuning (+exp=sft_..., then lora.init_from=RUN), easier problems "
            "(data.path or another data=), or a larger model (model.path)"
        )
    return Finding(
        name="constant reward",
        level=STOP,
        text=f"every completion got the reward {reward:g}: there is nothing to learn from",
        advice=advice,
    )


def _form(numbers: PreflightNumbers) -> Iterator[Finding]:
    form = numbers.metrics.get(f"reward/{FORMAT}")
    if form is not None and form < FORMAT_CAUTION:
        yield Finding(
            name="format",
            level=CAUTION,
            text=f"the form asked for is met in {format_fraction(form)} of the completions",
            advice="data.examples that show it, or a warm start: +exp=sft_..., then lora.init_from=RUN",
        )
    right = numbers.pass_at.get(max(numbers.pass_at, default=0))
    if right is not None and right.value == 0 and numbers.num_distinct_rewards > 1:
        yield Finding(
            name="nothing right",
            level=CAUTION,
            text=f"no completion was right (pass@{max(numbers.pass_at)} at most {format_fraction(right.high)}): only "
            "the other components of the reward can rise at first",
            advice="a larger model (model.path), easier problems, or a warm start (lora.init_from)",
        )
