"""`python -m rlbench plan`: memory by part and time by phase before the run starts, from probes on this device."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlbench.commands.command_line import CommandLine
from rlbench.commands.stages import Stage, load_stage
from rlbench.commands.train import remove_if_unused
from rlbench.config.schema import RunConfig
from rlbench.tracking.console import PlanRow, RunConsole
from rlbench.tracking.formats import format_duration

if TYPE_CHECKING:
    from rlbench.planner.memory_plan import MemoryPlan
    from rlbench.planner.probes import Probes
    from rlbench.tracking.device_memory import DeviceMemory

USAGE = "python -m rlbench plan +exp=NAME [key=value ...]"
TOO_LARGE = 7  # exit status: no-go, as of preflight


def command_line() -> CommandLine:
    return CommandLine("plan", USAGE)


def with_folder(overrides: Sequence[str]) -> list[str]:
    """The overrides, with a folder of the command's own unless the user names one."""
    if any(override.startswith("hydra.run.dir=") for override in overrides):
        return list(overrides)
    return [*overrides, f"hydra.run.dir='outputs/${{name}}/plan_{datetime.now():%Y-%m-%d_%H-%M-%S}'"]


def plan(config: RunConfig, notes: Sequence[str]) -> int:
    """Exit status: 0 if the run fits, 7 if not.

    Raises:
        ValueError: a mistake of the user.
    """
    from hydra.core.hydra_config import HydraConfig

    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        return _plan(config, notes, folder)
    except (ValueError, KeyboardInterrupt):
        remove_if_unused(folder)
        raise


def _plan(config: RunConfig, notes: Sequence[str], folder: Path) -> int:
    console = RunConsole(quiet=config.tracking.quiet)
    for note in notes:
        console.note(note)
    stage = load_stage(config.stage)
    with console.phase("reading data and model"):
        inputs = stage.prepare(config)
    with console.phase("loading the model"):
        parts = stage.build(inputs)
    try:
        from rlbench.planner.run_plan import FILE_NAME, plan_record

        probe = _probe_online if config.stage == "rl" else _probe_offline
        made, probes, memory = probe(stage, inputs, parts, console)
    finally:
        console.close()
        parts.close()
    console.plan(list(_rows(made, probes, config, memory.name)))
    record = plan_record(made, config, memory, "measured by `plan`") | {"probes": asdict(probes)}
    (folder / FILE_NAME).write_text(json.dumps(record, indent=1))
    console.note(f"numbers {folder / FILE_NAME}")
    if not made.fits:
        console.warning(
            f"the run would need {made.peak_gib:.1f} GiB, expected at most 90% of the {made.limit_gib:.1f} GiB that "
            f"are free; {made.knobs[0].setting} saves {made.knobs[0].saves_gib:.1f} GiB"
        )
    return 0 if made.fits else TOO_LARGE


def _probe_online(
    stage: Stage, inputs: Any, parts: Any, console: RunConsole
) -> tuple[MemoryPlan, Probes, DeviceMemory]:
    from rlbench.data.prompts import longest_prompt_tokens
    from rlbench.planner.memory_plan import make_plan
    from rlbench.planner.probes import run_probes
    from rlbench.tracking.device_memory import device_memory

    del stage
    memory = device_memory(inputs.config.hardware, parts.engine.released_bytes)
    limit = memory.limit()
    with console.phase("probing"):
        probes = run_probes(inputs, parts, memory)
    longest = longest_prompt_tokens(inputs.train.prompts)
    return make_plan(probes, inputs.config, limit, longest, inputs.context_tokens), probes, memory


def _probe_offline(
    stage: Stage, inputs: Any, parts: Any, console: RunConsole
) -> tuple[MemoryPlan, Probes, DeviceMemory]:
    from rlbench.planner.memory_plan import offline_plan
    from rlbench.planner.offline_probes import probed_loop, run_offline_probes
    from rlbench.tracking.device_memory import device_memory

    memory = device_memory(inputs.config.hardware)
    limit = memory.limit()
    with console.phase("probing"), probed_loop(stage.load_loop(), inputs, parts, console) as loop:
        probes = run_offline_probes(loop, memory)
    return offline_plan(probes, inputs.config, limit), probes, memory


def _rows(made: MemoryPlan, probes: Probes, config: RunConfig, kind: str) -> Iterator[PlanRow]:
    memory = f"Memory ({kind}), GiB"
    for name, gib in made.memory_gib.items():
        yield PlanRow(memory, name, f"{gib:.2f}", "#" * round(30 * max(0.0, gib) / made.peak_gib))
    if made.paged_gib:
        note = "beside the peak: the driver moves it to host memory where the device is full"
        yield PlanRow(memory, "optimizer state, paged", f"{made.paged_gib:.2f}", note)
    free = f"{made.limit_gib - made.peak_gib:.2f} of {made.limit_gib:.2f} stay free"
    yield PlanRow(memory, "peak", f"{made.peak_gib:.2f}", free)
    if made.max_completion_tokens is not None:
        yield PlanRow(
            memory, "peak by phase", f"generation {made.generation_peak_gib:.2f}, update {made.update_peak_gib:.2f}"
        )
    for name, seconds in made.time_s.items():
        yield PlanRow("Time of a step, at most", name, format_duration(seconds))
    total = sum(made.time_s.values())
    run = format_duration(total * (config.training.num_steps or 0))
    yield PlanRow(
        "Time of a step, at most", "in all", format_duration(total), f"{run} for {config.training.num_steps} steps"
    )
    yield PlanRow("Room", "training.tokens_per_microbatch", f"up to {made.max_microbatch_tokens}",
                  f"{probes.microbatch_tokens} are used; a line through {len(probes.update)} sizes")  # fmt: skip
    if made.max_completion_tokens is not None:
        yield PlanRow("Room", "sampling.max_tokens", f"up to {made.max_completion_tokens}", "with the longest prompt")
    for knob in made.knobs:
        yield PlanRow("What buys memory", knob.setting, f"saves {knob.saves_gib:.2f} GiB")
