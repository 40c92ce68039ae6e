"""The preflight as a page of text: success, rewards, time, extreme outputs, verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlbench.planner.preflight_numbers import PreflightNumbers, Share
from rlbench.planner.preflight_probe import Times
from rlbench.planner.preflight_verdict import STOP, Finding, is_go
from rlbench.records import FINISH_LENGTH, Rollout
from rlbench.tracking.formats import format_duration, format_fraction, format_number
from rlbench.tracking.metrics import component_names
from rlbench.tracking.safe_text import printable, shorten

BAR_CHARS = 24
EXCERPT_CHARS = 60


def page(
    numbers: PreflightNumbers,
    times: Times,
    findings: Sequence[Finding],
    shortest: Sequence[Rollout],
    longest: Sequence[Rollout],
    num_steps: int,
) -> RenderableType:
    return Group(
        _section("Policy", _policy_rows(numbers)),
        _section("Rewards", _reward_rows(numbers)),
        _section("A step", _time_rows(times, num_steps)),
        outputs("Shortest outputs", shortest),
        outputs("Longest outputs", longest),
        verdict(findings),
    )


def verdict(findings: Sequence[Finding]) -> RenderableType:
    go = is_go(list(findings))
    lines: list[Text] = []
    for finding in findings:
        style = "bold red" if finding.level == STOP else "yellow"
        lines.append(Text.assemble((f"{finding.level}: {finding.name}. ", style), printable(finding.text)))
        lines.append(Text.assemble(("  change: ", "dim"), printable(finding.advice)))
    title = "GO" if go else "NO GO"
    body = Group(*lines) if lines else Text("nothing speaks against this run")
    style = "red" if not go else "yellow" if findings else "green"
    return Panel(body, title=Text(title, style=f"bold {style}"), title_align="left", border_style=style)


def _section(title: str, rows: Iterator[tuple[str, str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2))
    table.add_column(min_width=22, no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", overflow="fold")
    for name, value, note in rows:
        table.add_row(Text(printable(name)), Text(value), Text(printable(note)))
    return table


def _policy_rows(numbers: PreflightNumbers) -> Iterator[tuple[str, str, str]]:
    sampled = f"{numbers.num_prompts} training prompts, {numbers.samples_per_prompt} completions each"
    for k, share in numbers.pass_at.items():
        yield f"pass@{k}", *_of(share, sampled if k == 1 else "")
    if not numbers.pass_at:
        yield "pass@1", "-", f"no verdict of a reward component named accuracy; {sampled}"
    if numbers.no_signal is not None:
        yield "groups without signal", *_of(numbers.no_signal, f"expected in groups of {numbers.group_size}")
    yield "truncated", *_of(numbers.truncated, "")
    mean, low, high = (numbers.metrics[f"completion/length_tokens_{part}"] for part in ("mean", "min", "max"))
    yield "length", f"{mean:.0f}", f"tokens in the mean, {low:.0f} to {high:.0f}"


def _of(share: Share, note: str) -> tuple[str, str]:
    interval = f"95% interval {100 * share.low:.1f} to {100 * share.high:.1f}%"
    return format_fraction(share.value, 1), f"{interval}{'; ' if note else ''}{note}"


def _reward_rows(numbers: PreflightNumbers) -> Iterator[tuple[str, str, str]]:
    metrics = numbers.metrics
    if "reward/mean" in metrics:
        values = f"{numbers.num_distinct_rewards} different value{'s' * (numbers.num_distinct_rewards != 1)}"
        spread = f"standard deviation {metrics['reward/std']:.3f}, {values}"
        yield "reward", f"{metrics['reward/mean']:.3f}", spread
    for name in component_names(metrics):
        yield name, f"{metrics[f'reward/{name}']:.3f}", "mean of the component"
    for kind in ("error", "timeout"):
        if share := metrics.get(f"reward/{kind}_frac"):
            yield f"{kind}s", format_fraction(share, 1), "of the rollouts"


def _time_rows(times: Times, num_steps: int) -> Iterator[tuple[str, str, str]]:
    for name, seconds in times.phases.items():
        yield name, format_duration(seconds), "#" * round(BAR_CHARS * seconds / times.step_s)
    rate = format_number(times.generation_tokens_per_s)
    yield "step", format_duration(times.step_s), f"generation at {rate} tokens/s"
    yield "whole run", format_duration(times.run_s), f"{num_steps} steps and the evaluations"


def outputs(title: str, rollouts: Sequence[Rollout]) -> Table:
    """One row a rollout: its length, reward, how it ended, and both ends of its text."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2), header_style="dim")
    for name in ("tokens", "reward"):
        table.add_column(name, justify="right", min_width=len(name))
    table.add_column("end", min_width=3)
    table.add_column("text", overflow="fold")  # no_wrap would leave no room for the others at 80 columns
    for rollout in rollouts:
        end = "cut" if rollout.completion.finish_reason == FINISH_LENGTH else "own"
        text = printable(shorten(rollout.completion_text, EXCERPT_CHARS))
        table.add_row(str(len(rollout.completion.token_ids)), format_number(rollout.reward), end, Text(text))
    return table
