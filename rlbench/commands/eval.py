"""`python -m rlbench eval RUN`: a policy's answers to held-out prompts, after its run, alone or beside another's."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from rlbench.commands.command_line import CommandLine
from rlbench.commands.eval_against import Against, find_against, note_differences, other_inputs
from rlbench.commands.eval_files import Places, reserve, write
from rlbench.commands.eval_held_out import describe_data, hold_out
from rlbench.commands.eval_settings import run_settings, untrained_settings
from rlbench.commands.eval_weights import Side, find_side
from rlbench.commands.run_step import BASE, LAST, policy_config
from rlbench.commands.train import remove_if_unused
from rlbench.config.schema import RunConfig
from rlbench.tracking.console import RunConsole
from rlbench.tracking.safe_text import printable

if TYPE_CHECKING:
    from rlbench.build import Inputs
    from rlbench.commands.eval_measure import Measured

USAGE = (
    "python -m rlbench eval RUN [--step N|last|best] [--against base|RUN2[@STEP]] [--out FILE.json] [key=value ...], "
    "or eval +exp=NAME [key=value ...]"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    run_folder: Path | None  # None: the policy that a config starts with
    step: str
    against: str | None
    out: Path | None
    overrides: list[str]


def command_line() -> CommandLine:
    line = CommandLine("eval", USAGE)
    line.add_argument("--step", help="a step that was kept, last or best (default: last)")
    line.add_argument("--against", help="base, or another run, whose answers are compared prompt by prompt")
    line.add_argument("--out", help="the file of the numbers (default: in the run's folder evaluations)")
    return line


def parse(arguments: Sequence[str]) -> EvalOptions:
    """
    Raises:
        ValueError: an option has no proper value, or there is neither a run nor an experiment.
    """
    parser = command_line()
    options, rest = parser.split(arguments)
    run_folder = None
    if rest and "=" not in rest[0] and not rest[0].startswith(("-", "+", "~")):
        run_folder, rest = Path(rest[0]).expanduser(), rest[1:]
    elif not any(argument.startswith("+exp=") for argument in rest):
        raise parser.mistake("eval needs the folder of a run, or +exp=NAME")
    elif options.step is not None:
        raise parser.mistake(f"--step is {options.step}, but no run is given")
    return EvalOptions(
        run_folder=run_folder,
        step=options.step or LAST,
        against=options.against,
        out=None if options.out is None else Path(options.out).expanduser(),
        overrides=rest,
    )


def overrides_for_hydra(options: EvalOptions) -> list[str]:
    """Of an evaluation without a run, with a folder of its own."""
    if any(override.startswith("hydra.run.dir=") for override in options.overrides):
        return options.overrides
    return [*options.overrides, f"hydra.run.dir='outputs/${{name}}/eval_{datetime.now():%Y-%m-%d_%H-%M-%S}'"]


def eval_run(options: EvalOptions) -> int:
    """Evaluate the policy of a run; the exit status is 0, or as of a run that had to stop.

    Raises:
        ValueError: a mistake of the user.
        TrackingError: a file cannot be written.
    """
    assert options.run_folder is not None
    run_folder = options.run_folder
    trained = policy_config(run_folder)
    config = run_settings(run_folder, trained, options.overrides)
    notes = hold_out(config, trained, run_folder)
    side, damaged = find_side(run_folder, trained, options.step, "--step")
    return _evaluate(config, side, options, run_folder, notes, [*damaged, *_changes(trained, config)])


def eval_untrained(composed: RunConfig, notes: Sequence[str], options: EvalOptions) -> int:
    """Evaluate the policy that a run of this config would start with; as `eval_run`."""
    from hydra.core.hydra_config import HydraConfig

    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        config = untrained_settings(composed)
        start = config.lora.init_from
        if options.against == BASE and start is None:
            raise ValueError("--against is base, but so is the policy; expected a run, or lora.init_from=RUN")
        side = Side(name="the base" if start is None else f"the adapter of {start}", is_base=start is None)
        return _evaluate(config, side, options, folder, [*notes, *hold_out(config, None, None)], [])
    finally:
        remove_if_unused(folder)


def _evaluate(
    config: RunConfig,
    side: Side,
    options: EvalOptions,
    folder: Path,
    notes: Sequence[str],
    warnings: Sequence[str],
) -> int:
    console = RunConsole(quiet=config.tracking.quiet)
    for line in warnings:
        console.warning(line)
    for line in notes:
        console.note(line)
    against = find_against(options.against, side, console)
    places = reserve(folder, f"step-{side.step:06d}" if side.checkpoint else "untrained", options.out)
    is_done = False
    try:
        status = _measured_status(config, side, against, options.overrides, places, console)
        is_done = status == 0
        return status
    finally:
        console.close()
        if not is_done:
            places.give_up()


def _measured_status(
    config: RunConfig,
    side: Side,
    against: Against | None,
    overrides: Sequence[str],
    places: Places,
    console: RunConsole,
) -> int:
    from rlbench.checks.policy_identity import PolicyIdentityError
    from rlbench.engine.interface import EngineCorruptedError, EngineDeadError
    from rlbench.training.microbatch_budget import RunMemoryError

    failures: dict[type[BaseException], int] = {
        EngineDeadError: 10,
        RunMemoryError: 8,
        PolicyIdentityError: 6,
        EngineCorruptedError: 6,
        KeyboardInterrupt: 128 + signal.SIGINT,
    }
    try:
        _measure_and_tell(config, side, against, overrides, places, console)
    except tuple(failures) as error:
        what = "stopped" if isinstance(error, KeyboardInterrupt) else f"error: {error}"
        console.error(f"{what}; nothing of this evaluation was kept")
        return failures[type(error)]
    return 0


def _measure_and_tell(
    config: RunConfig,
    side: Side,
    against: Against | None,
    overrides: Sequence[str],
    places: Places,
    console: RunConsole,
) -> None:
    from rlbench.commands.eval_measure import prepare_evaluation
    from rlbench.commands.eval_paired import compare
    from rlbench.commands.eval_text import paired_lines, policy_lines

    with console.phase("reading data and model"):
        inputs = prepare_evaluation(config)
        others = other_inputs(against, inputs, overrides) if against else None
    data = describe_data(inputs, inputs.train)
    console.note(f"data: {data}")
    if against and others and against.trained:
        note_differences(against, inputs, others, console)
    policy, other = _measure(inputs, side, others, against.side if against else None, console)
    pairs = compare(policy, other) if other else []
    files = write(places, data, policy, other, pairs)
    lines = ["", *policy_lines(policy)]
    if other:
        lines += ["", *policy_lines(other), "", *paired_lines(policy, other, pairs)]
    lines += ["", f"numbers  {places.numbers}", *(f"answers  {file}" for file in files)]
    console.show(Text("\n".join(printable(line) for line in lines)))


def _measure(
    inputs: Inputs, side: Side, others: Inputs | None, other: Side | None, console: RunConsole
) -> tuple[Measured, Measured | None]:
    from rlbench.commands.chain import free_memory
    from rlbench.commands.eval_measure import measure

    if other is None or others is None:
        found = {m.side.name: m for m in measure(inputs, [side] if other is None else [side, other], console)}
        return found[side.name], None if other is None else found[other.name]
    (policy,) = measure(inputs, [side], console)
    free_memory()
    (against,) = measure(others, [other], console)
    return policy, against


def _changes(trained: RunConfig, config: RunConfig) -> list[str]:
    """What makes the policy another than the one that was trained."""
    names = ("dtype", "quantization")
    pairs = {name: (getattr(trained.model, name), getattr(config.model, name)) for name in names}
    return [f"model.{name} is {b}, in training it was {a}" for name, (a, b) in pairs.items() if a != b]
