"""`python -m rlbench rescore RUN`: other rewards on recorded rollouts, and how the advantages would have changed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import StatisticsError, correlation, fmean
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlbench.commands.command_line import CommandLine, section_of
from rlbench.config.recorded import recorded_config
from rlbench.config.schema import RunConfig
from rlbench.config.trained_reward import check_without_model
from rlbench.records import RolloutGroup
from rlbench.tracking.rollout_store import read_groups
from rlbench.tracking.safe_text import printable, shorten

_READ = ("rewards", "algorithm", "sampling")  # sections of the config
USAGE = "python -m rlbench rescore RUN [--steps FIRST:LAST] [rewards=CHOICE] [key=value ...] [~key]"
_NUM_EXAMPLES = 3
_NAME = re.compile(r"step-\d+\.parquet")
_EMPTY = "(empty completion: no tokens)"
_TOLERANCE = 1e-6  # of an advantage that counts as unchanged

Pair = tuple[float | None, float | None]  # recorded, new; None: no value


@dataclass(slots=True)
class Comparison:
    """Recorded and new values of all rollouts."""

    num_groups: int = 0
    num_empty: int = 0  # completions without tokens
    components: dict[str, list[Pair]] = field(default_factory=dict)
    rewards: list[tuple[str, str, Pair]] = field(default_factory=list)  # rollout_id, completion text, rewards
    advantages: list[tuple[float, float]] = field(default_factory=list)  # of rollouts that have both
    num_no_signal: tuple[int, int] = (0, 0)  # groups, recorded and new
    failures: Counter[str] = field(default_factory=Counter)  # what rewards that broke said
    no_advantages: str = ""  # why advantages were not compared


def rescore(arguments: Sequence[str]) -> int:
    """Exit status: 0, or 1 if a reward broke on some rollout.

    Raises:
        ValueError: anything a user can get wrong.
        TrackingError: a rollout file cannot be read.
    """
    run_folder, steps, overrides = _parse(arguments)
    config = recorded_config(run_folder, overrides)
    found = compare(config, rollout_files(run_folder, steps))
    console = Console()
    _print(console, found)
    if config.algorithm.replay.is_on:
        console.print("Advantages are those of each step's own rollouts, without what algorithm.replay put among them.")
    return 1 if found.failures else 0


def rollout_files(run_folder: Path, steps: tuple[int, int] | None = None) -> list[Path]:
    """Files of the training steps, first to last.

    Raises:
        ValueError: there is none.
    """
    files = sorted(file for file in (run_folder / "rollouts").glob("step-*.parquet") if _NAME.fullmatch(file.name))
    if steps is not None:
        files = [file for file in files if steps[0] <= int(file.stem.removeprefix("step-")) <= steps[1]]
    if not files:
        which = f" of steps {steps[0]} to {steps[1]}" if steps else ""
        raise ValueError(f"{run_folder} holds no rollouts{which}; expected rollouts/step-*.parquet of a run")
    return files


def compare(config: RunConfig, files: Iterable[Path]) -> Comparison:
    """Score every rollout of the files with the rewards of `config`.

    Raises:
        ValueError: a reward cannot be built.
    """
    from rlbench.models.device import usable_cores
    from rlbench.rollouts.score import Scorer

    check_without_model(config.rewards, "rescore")
    scorer = Scorer(replace(config.rewards, num_workers=config.rewards.num_workers or min(4, usable_cores())))
    found = Comparison()
    try:
        for file in files:
            recorded = read_groups(file)
            rescored = _rescore(recorded, scorer)
            _compare_rewards(found, recorded, rescored)
            _compare_advantages(found, recorded, rescored, config)
    finally:
        scorer.close()
    return found


def _rescore(groups: Sequence[RolloutGroup], scorer: Any) -> list[RolloutGroup]:
    scores = scorer.score(
        [group.prompt for group in groups],
        [[rollout.completion for rollout in group.rollouts] for group in groups],
        [[rollout.completion_text for rollout in group.rollouts] for group in groups],
    )
    return [
        replace(
            group,
            rollouts=tuple(
                replace(rollout, components=components, reward=reward)
                for rollout, components, reward in zip(group.rollouts, of_group, scorer.totals(of_group), strict=True)
            ),
        )
        for group, of_group in zip(groups, scores, strict=True)
    ]


def _compare_rewards(found: Comparison, recorded: Sequence[RolloutGroup], rescored: Sequence[RolloutGroup]) -> None:
    found.num_groups += len(recorded)
    for old_group, new_group in zip(recorded, rescored, strict=True):
        for old, new in zip(old_group.rollouts, new_group.rollouts, strict=True):
            found.num_empty += old.completion.is_empty
            text = _EMPTY if old.completion.is_empty else old.completion_text
            found.rewards.append((old.rollout_id, text, (old.reward, new.reward)))
            for name in dict.fromkeys([*old.components, *new.components]):
                before, after = old.components.get(name), new.components.get(name)
                pair = (before.value if before else None, after.value if after else None)
                found.components.setdefault(name, []).append(pair)
                if after and after.status in ("error", "timeout"):
                    found.failures[f"{name}: {after.status}: {after.message}"] += 1


def _compare_advantages(
    found: Comparison, recorded: Sequence[RolloutGroup], rescored: Sequence[RolloutGroup], config: RunConfig
) -> None:
    """By the run's own algorithm, for both sides: the recorded ones were made by code that may be older."""
    from rlbench.rollouts.credit import RewardFailure, credit

    if config.algorithm.has_kl_reward:
        found.no_advantages = "the run's rewards hold a KL penalty, which is not in the recorded rollouts"
        return
    if config.algorithm.has_teacher:
        found.no_advantages = "the run's advantages are its teacher's, whatever the rewards"
        return
    if config.algorithm.pairs.is_on:
        found.no_advantages = "the run trains on pairs of rollouts, which have none"
        return
    limit = config.sampling.max_tokens
    try:
        before, after = (
            credit(groups, config.algorithm, config.rewards, max_completion_tokens=limit)
            for groups in (recorded, rescored)
        )
    except RewardFailure as error:
        found.no_advantages = str(error)
        return
    shared = [name for name in before.advantages if name in after.advantages]
    found.advantages += [(before.advantages[name], after.advantages[name]) for name in shared]
    old, new = found.num_no_signal
    found.num_no_signal = (old + before.num_no_signal_groups, new + after.num_no_signal_groups)


def _print(console: Console, found: Comparison) -> None:
    table = Table("", "recorded", "new", "changed", "correlation", title=f"{len(found.rewards)} rollouts")
    table.add_row("reward", *_cells([pair for _, _, pair in found.rewards]))
    for name, pairs in found.components.items():
        table.add_row(f"  {escape(name)}", *_cells(pairs))
    console.print(table)
    if found.no_advantages:
        console.print(f"advantages are not compared: {escape(found.no_advantages)}")
    else:
        changed = sum(abs(before - after) > _TOLERANCE for before, after in found.advantages)
        turned = sum(before * after < 0 for before, after in found.advantages)
        old, new = found.num_no_signal
        console.print(
            f"advantages: {changed} of {len(found.advantages)} changed, {turned} of them in sign; groups without "
            f"signal: {old} -> {new} of {found.num_groups}",
            soft_wrap=True,
        )
    if found.num_empty:
        console.print(
            f"empty completions: {found.num_empty} of {len(found.rewards)}; they have no tokens, so no advantages, and "
            "the others are not compared with them",
            soft_wrap=True,
        )
    for message, count in found.failures.most_common(_NUM_EXAMPLES):
        console.print(f"broke on {count} rollouts: {escape(printable(message))}")
    for rollout_id, text, pair in _largest_changes(found):
        shown = escape(printable(shorten(text, 300)))
        console.print(
            f"\n{rollout_id}: {_number(pair[0])} -> {_number(pair[1])}\n{shown}", highlight=False, soft_wrap=True
        )


def _largest_changes(found: Comparison) -> list[tuple[str, str, Pair]]:
    def size(entry: tuple[str, str, Pair]) -> float:
        before, after = entry[2]
        return float("inf") if before is None or after is None else abs(before - after)

    changed = [entry for entry in found.rewards if entry[2][0] != entry[2][1]]
    return sorted(changed, key=size, reverse=True)[:_NUM_EXAMPLES]


def _cells(pairs: Sequence[Pair]) -> list[str]:
    both = [(before, after) for before, after in pairs if before is not None and after is not None]
    try:
        related = f"{correlation(*zip(*both, strict=True)):.3f}"
    except (StatisticsError, TypeError):  # fewer than two, or all equal
        related = "-"
    columns = [[value for value in column if value is not None] for column in zip(*pairs, strict=True)]
    means = [f"{fmean(values):.4f}" if values else "-" for values in columns]
    return [*means, str(sum(before != after for before, after in pairs)), related]


def _number(value: float | None) -> str:
    return "no reward" if value is None else f"{value:.4g}"


def command_line() -> CommandLine:
    line = CommandLine("rescore", USAGE, settings=f"Settings of {', '.join(_READ)} may follow as key=value.")
    line.add_argument("--steps", help="FIRST:LAST, or one step (default: all)")
    return line


def _parse(arguments: Sequence[str]) -> tuple[Path, tuple[int, int] | None, list[str]]:
    options, (run_folder,), overrides = command_line().split_places(arguments)
    steps = None
    if options.steps is not None:
        first, colon, last = options.steps.partition(":")
        if not first.isdigit() or (colon and not last.isdigit()):
            raise ValueError(f"--steps is {options.steps}, expected FIRST:LAST or one step, e.g. --steps 1:10")
        steps = (int(first), int(last) if colon else int(first))
    for override in overrides:
        if section_of(override) not in _READ:
            raise ValueError(
                f"rescore reads settings of {', '.join(_READ)} alone, so {override} would change nothing; expected "
                "none of another section"
            )
    return run_folder, steps, overrides
