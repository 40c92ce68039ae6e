"""`python -m rlbench reward test`: put each configured reward on trial before it costs GPU time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlbench.commands.command_line import CommandLine
from rlbench.config.checks import nearest
from rlbench.config.schema import RewardsConfig, RunConfig
from rlbench.config.trained_reward import check_without_model
from rlbench_rewards import RewardPool, RewardSample
from rlbench_rewards.trial import FAIL, PASS, Report, as_plain, peak_memory_mib, try_reward

USAGE = "python -m rlbench reward test [+exp=NAME] [overrides] [--rows N] [--json FILE]"
_DEFAULT_ROWS = 200
_STYLES = {PASS: "green", FAIL: "bold red"}


@dataclass(frozen=True, slots=True)
class TrialOptions:
    num_rows: int  # of the training data; 0: all
    json_path: Path | None


def command_line() -> CommandLine:
    line = CommandLine("reward test", USAGE)
    rows = f"of the data, whose gold answers are tried; 0: all (default: {_DEFAULT_ROWS})"
    line.add_argument("--rows", type=int, default=_DEFAULT_ROWS, help=rows)
    line.add_argument("--json", type=Path, help="a file for the verdicts")
    return line


def split_arguments(arguments: Sequence[str]) -> tuple[TrialOptions, list[str]]:
    """The command's own options, and the overrides for Hydra.

    Raises:
        ValueError: the sub-command is not `test`, or an option has no proper value.
    """
    if not arguments or arguments[0] != "test":
        got = arguments[0] if arguments else "nothing"
        hint = "; did you mean test?" if nearest(got, ["test"], count=1) else ""
        raise ValueError(f"reward is followed by {got}, expected: {USAGE}{hint}")
    found, overrides = command_line().split(arguments[1:])
    if found.rows < 0:
        raise ValueError(f"--rows is {found.rows}, expected a number of rows, 0 for all")
    return TrialOptions(found.rows, found.json), overrides


def reward_test(config: RunConfig, options: TrialOptions) -> int:
    """Exit status: 0 if every reward passes, 1 if one fails.

    Raises:
        ValueError: no reward is configured, one cannot be built, or the data cannot be had.
    """
    from rlbench.data.sources import load_rows

    console = Console()
    if not config.rewards.components:
        raise ValueError("rewards.components is empty, expected at least one reward")
    check_without_model(config.rewards, "reward test")
    loaded = load_rows(replace(config.data, limit=options.num_rows or config.data.limit), "train")
    rows = _rows(config, loaded.dataset, options.num_rows)
    console.print(f"{loaded.description}; {len(rows)} of them are used", highlight=False)
    reports: dict[str, Report] = {}
    memory: dict[str, float | None] = {}
    for name in config.rewards.components:
        reports[name], memory[name] = _try(config.rewards, name, rows)
        _print(console, reports[name], memory[name])
    plain = as_plain(reports, memory)
    if options.json_path is not None:
        options.json_path.parent.mkdir(parents=True, exist_ok=True)
        options.json_path.write_text(json.dumps({"command": "reward test", **plain}, indent=1))
        console.print(f"written to {options.json_path}", highlight=False)
    failed = [name for name, report in reports.items() if not report.has_passed]
    console.print("[bold red]failed: " + ", ".join(failed) if failed else "[bold green]all rewards pass")
    return 1 if failed else 0


def _rows(config: RunConfig, dataset: object, limit: int) -> list[RewardSample]:
    from rlbench.data.chat import question_text
    from rlbench.data.prompts import select_rows
    from rlbench.data.sources import LoadedRows

    selected = select_rows(
        LoadedRows(dataset=dataset, description="", bad_rows=()),  # type: ignore[arg-type]
        limit=limit or None,
        shuffle_seed=config.data.seed if config.data.shuffle else None,
    )
    return [
        RewardSample(
            prompt=question_text(row, config.data),
            completion="",
            prompt_id=f"train/{row['row_number']}",
            columns={**row, "answer": row[config.data.answer_column]},
        )
        for row in selected
    ]


def _try(rewards: RewardsConfig, name: str, rows: list[RewardSample]) -> tuple[Report, float | None]:
    from rlbench.rollouts.score import reward_specs
    from rlbench_rewards.loading import load_reward

    spec = next(spec for spec in reward_specs(rewards) if spec["name"] == name)
    columns = list(rows[0].columns) if rows else None
    with RewardPool(
        [spec],
        num_workers=rewards.num_workers or 2,
        timeout_s=rewards.timeout_s,
        allowed_prefixes=rewards.allowed_prefixes,
        columns=columns,
        max_retries=rewards.max_retries,
    ) as pool:
        target = load_reward(name, spec["path"], spec["kwargs"], rewards.allowed_prefixes, columns=columns).target
        is_accuracy = getattr(target, "needs_right_answer", name == "accuracy")
        report = try_reward(pool, name, target, rows, is_accuracy=is_accuracy)
        return report, peak_memory_mib(pool.pids())


def _print(console: Console, report: Report, memory_mib: float | None) -> None:
    table = Table(
        title=report.name, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2)
    )
    for check in report.checks:
        style = _STYLES.get(check.verdict, "dim")
        table.add_row(f"[{style}]{check.verdict}", check.name, check.text)
        for row in check.rows:
            table.add_row("", "", f"[dim]{_escaped(row)}")
    p50, p99 = report.latency_s(50), report.latency_s(99)
    if p50 is not None and p99 is not None:
        memory = f", {memory_mib:.0f} MiB a worker" if memory_mib is not None else ""
        table.add_row("[dim]note", "cost", f"p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms{memory}")
    if report.agreement is not None:
        table.add_row("[dim]note", "agreement", f"{100 * report.agreement:.1f}% of gold and shuffled answers")
    console.print(table)


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")
