"""`python -m rlbench preflight`: sample the untrained policy as the run would, and say go or no-go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rlbench.commands.command_line import CommandLine
from rlbench.commands.train import remove_if_unused
from rlbench.config.schema import RunConfig
from rlbench.records import Rollout, RolloutGroup
from rlbench.tracking.console import RunConsole
from rlbench.tracking.plain_json import to_json

USAGE = "python -m rlbench preflight +exp=NAME [overrides] [--prompts N] [--samples N]"
NO_GO = 7  # exit status
NUM_EXTREMES = 10  # shortest and longest outputs shown
_DEFAULT_PROMPTS = 32


@dataclass(frozen=True, slots=True)
class PreflightOptions:
    num_prompts: int
    samples_per_prompt: int | None  # None: the run's group size


def command_line() -> CommandLine:
    line = CommandLine("preflight", USAGE)
    line.add_argument(
        "--prompts", type=int, default=_DEFAULT_PROMPTS, help=f"of the training data (default: {_DEFAULT_PROMPTS})"
    )
    line.add_argument("--samples", type=int, help="completions of each (default: algorithm.group_size)")
    return line


def split_arguments(arguments: Sequence[str]) -> tuple[PreflightOptions, list[str]]:
    """The command's own options, and the overrides for Hydra.

    Raises:
        ValueError: an option has no proper value.
    """
    found, overrides = command_line().split(arguments)
    for name, value in (("--prompts", found.prompts), ("--samples", found.samples)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if not any(override.startswith("hydra.run.dir=") for override in overrides):
        overrides.append(f"hydra.run.dir='outputs/${{name}}/preflight_{datetime.now():%Y-%m-%d_%H-%M-%S}'")
    return PreflightOptions(found.prompts, found.samples), overrides


def preflight(config: RunConfig, notes: Sequence[str], options: PreflightOptions) -> int:
    """Exit status: 0 for go, with cautions or not, 7 for no-go.

    Raises:
        ValueError: a mistake of the user.
    """
    from hydra.core.hydra_config import HydraConfig

    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        return _preflight(config, notes, options, folder)
    except (ValueError, KeyboardInterrupt):
        remove_if_unused(folder)
        raise


def _preflight(config: RunConfig, notes: Sequence[str], options: PreflightOptions, folder: Path) -> int:
    if config.stage != "rl":
        raise ValueError(f"stage is {config.stage}, but preflight samples a policy; expected an experiment of stage=rl")
    console = RunConsole(quiet=config.tracking.quiet)
    for note in notes:
        console.note(note)
    from rlbench.build import build, prepare

    with console.phase("reading data and model"):
        inputs = prepare(config)
    samples_per_prompt = _samples_per_prompt(config, options)
    with console.phase("loading the model"):
        parts = build(inputs)
    try:
        return _fly(inputs, parts, options.num_prompts, samples_per_prompt, folder, console)
    finally:
        console.close()
        parts.close()


def _samples_per_prompt(config: RunConfig, options: PreflightOptions) -> int:
    size = config.algorithm.group_size or 1
    count = options.samples_per_prompt or size
    if count < size:
        raise ValueError(
            f"--samples is {count}, expected at least algorithm.group_size ({size}): the share of groups without "
            "signal is estimated from them"
        )
    return count


def _fly(inputs: Any, parts: Any, num_prompts: int, samples_per_prompt: int, folder: Path, console: RunConsole) -> int:
    from rlbench.planner import preflight_probe, preflight_text
    from rlbench.planner.preflight_numbers import measure
    from rlbench.planner.preflight_verdict import is_go, judge

    config = inputs.config
    prompts = preflight_probe.draw_prompts(inputs, num_prompts)
    with console.phase("sampling"):
        sampled = preflight_probe.sample(
            inputs,
            parts,
            prompts,
            samples_per_prompt,
            lambda done: console.progress("sampling", done, len(prompts), "prompts"),
        )
    numbers = measure(sampled.groups, config)
    with console.phase("timing an update"):
        times = preflight_probe.predict_times(inputs, parts, sampled, numbers)
    findings = judge(numbers, config)
    shortest, longest = _extremes(sampled.groups)
    num_steps = config.training.num_steps or 0
    if config.tracking.quiet:
        console.show(preflight_text.verdict(findings))
    else:
        console.show(preflight_text.page(numbers, times, findings, shortest, longest, num_steps))
    result = {
        "is_go": is_go(findings),
        "findings": [asdict(finding) for finding in findings],
        "numbers": asdict(numbers),
        "times": asdict(times) | {"step_s": times.step_s},
        "measured_s": sampled.seconds,
        "shortest": [rollout.rollout_id for rollout in shortest],
        "longest": [rollout.rollout_id for rollout in longest],
    }
    (folder / "preflight.json").write_text(json.dumps(result, indent=1))
    (folder / "samples.jsonl").write_text("".join(map(_line, sampled.groups)))
    console.show(f"numbers {folder / 'preflight.json'}\nall texts {folder / 'samples.jsonl'}")
    return 0 if is_go(findings) else NO_GO


def _extremes(groups: Sequence[RolloutGroup]) -> tuple[list[Rollout], list[Rollout]]:
    """Shortest first, and longest first; a rollout is in one of the two."""
    rollouts = sorted(
        (rollout for group in groups for rollout in group.rollouts), key=lambda r: len(r.completion.token_ids)
    )
    count = min(NUM_EXTREMES, len(rollouts) // 2)
    return rollouts[:count], rollouts[::-1][:count]


def _line(group: RolloutGroup) -> str:
    return "".join(
        to_json(
            {
                "rollout_id": rollout.rollout_id,
                "num_tokens": len(rollout.completion.token_ids),
                "finish_reason": rollout.completion.finish_reason,
                "reward": rollout.reward,
                "components": {name: asdict(component) for name, component in rollout.components.items()},
                "prompt": rollout.prompt.text,
                "completion": rollout.completion_text,
            }
        )
        + "\n"
        for rollout in group.rollouts
    )
