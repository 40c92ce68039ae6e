"""`python -m rlbench chat RUN`: talk with a run's policy in the terminal, as the run sampled it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from rich.console import Console

from rlbench.commands.command_line import CommandLine, section_of
from rlbench.commands.run_step import LAST, Found, find_step
from rlbench.tracking.safe_text import SafeFile, printable, shorten

if TYPE_CHECKING:
    from rlbench.build import Inputs
    from rlbench.commands.chat_engine import ChatPolicy
    from rlbench.commands.chat_rewards import ChatRewards
    from rlbench.commands.chat_session import Session

_FIXED = ("lora", "training", "optim")  # sections that a run has settled
USAGE = "python -m rlbench chat RUN [--step N|last|best|base] [--compare N|last|best|base] [--seed S] [key=value ...]"
_TEMPERATURE = "sampling.temperature"
_ENGINE_FAILED, _ENGINE_CORRUPTED, _INTERRUPTED = 10, 6, 130  # exit status
_SYSTEM_CHARS = 80  # of the system prompt that are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    run_folder: Path
    step: str
    compare: str | None
    seed: int | None  # None: the run's
    is_greedy: bool
    overrides: list[str]


def chat(arguments: Sequence[str]) -> int:
    """Exit status: 0 at the end of the input, 6 or 10 if the engine failed, 130 after two Ctrl-C.

    Raises:
        ValueError: anything a user can get wrong before the dialogue begins.
    """
    options = parse_arguments(arguments)
    console = Console(file=cast(IO[str], SafeFile(sys.stdout)), highlight=False)
    try:
        return _chat(options, console)
    except KeyboardInterrupt:
        return _INTERRUPTED


def _chat(options: ChatOptions, console: Console) -> int:
    from rlbench.commands.chat_engine import ChatPolicy, answering_config, prepare_chat

    config = answering_config(options.run_folder, options.overrides)
    sides = _sides(options, config)

    from rlbench.commands.chat_session import input_lines
    from rlbench.engine.interface import EngineCorruptedError, EngineDeadError

    inputs = prepare_chat(config)
    policy = ChatPolicy(inputs)
    rewards = _rewards(inputs, policy, console)
    try:
        session = _session(options, inputs, policy, rewards, sides, console)
        return session.run(input_lines(console))
    except (EngineDeadError, EngineCorruptedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _ENGINE_CORRUPTED if isinstance(error, EngineCorruptedError) else _ENGINE_FAILED
    finally:
        if rewards is not None:
            rewards.close()
        policy.close()


def _sides(options: ChatOptions, config: object) -> dict[str, Found]:
    from rlbench.commands.chat_session import COMPARED, POLICY
    from rlbench.config.schema import RunConfig

    assert isinstance(config, RunConfig)
    sides = {POLICY: find_step(options.run_folder, options.step, config, may_be_base=True)}
    if options.compare is not None:
        sides[COMPARED] = find_step(options.run_folder, options.compare, config, "--compare", may_be_base=True)
        if sides[COMPARED].label == sides[POLICY].label:
            raise ValueError(f"--step and --compare are both {sides[POLICY].label}, expected two that differ")
    return sides


def _rewards(inputs: Inputs, policy: ChatPolicy, console: Console) -> ChatRewards | None:
    """None where they cannot be built here: a chat needs none."""
    from rlbench.commands.chat_rewards import ChatRewards

    try:
        return ChatRewards(inputs.config, policy.frozen_base)
    except ValueError as error:
        console.print(f"no rewards are shown: {error}", style="dim", markup=False, soft_wrap=True)
        return None


def _session(
    options: ChatOptions,
    inputs: Inputs,
    policy: ChatPolicy,
    rewards: ChatRewards | None,
    sides: dict[str, Found],
    console: Console,
) -> Session:
    """After the opening lines, which say what answers and how."""
    from rlbench.commands.chat_conversation import Conversation
    from rlbench.commands.chat_engine import answer_sampling
    from rlbench.commands.chat_session import COMMANDS, Session

    config = inputs.config
    sampling = answer_sampling(inputs, is_greedy=options.is_greedy)
    session = Session(
        options.run_folder,
        config,
        policy,
        rewards,
        Conversation(config.data, inputs.tokenizer),
        sampling,
        console,
        sides=sides,
        seed=config.seed if options.seed is None else options.seed,
    )
    for found in reversed(sides.values()):  # what answers first is in the engine then
        policy.use(found)
        session.say_weights(found)
    system = config.data.system_prompt
    shown = f"system prompt {printable(shorten(system, _SYSTEM_CHARS))!r}" if system else "no system prompt"
    lines = [
        f"{inputs.model.name}, engine={policy.engine.name}, sampling.temperature={sampling.temperature:g}, "
        f"sampling.max_tokens={sampling.max_tokens}, context {policy.context} tokens",
        f"{shown}, {len(config.data.examples)} solved examples before each conversation",
        ", ".join(f"{' '.join((name, c.argument)).strip()} {c.meaning}" for name, c in COMMANDS.items()),
    ]
    for line in lines:
        console.print(line, style="dim", markup=False, soft_wrap=True)
    return session


def command_line() -> CommandLine:
    line = CommandLine("chat", USAGE)
    line.add_argument("--step", default=LAST, help="a step that was kept, last, best or base (default: last)")
    line.add_argument("--compare", help="another step or the base, which answers too")
    line.add_argument("--seed", type=int, help="of the first answer (default: the run's)")
    return line


def parse_arguments(arguments: Sequence[str]) -> ChatOptions:
    """
    Raises:
        ValueError: no run is named, or an option is unknown or has no proper value.
    """
    options, (run_folder,), settings = command_line().split_places(arguments)
    from rlbench.commands.chat_session import NUM_SEEDS

    if options.seed is not None and not 0 <= options.seed < NUM_SEEDS:
        raise ValueError(f"--seed is {options.seed}, expected a number from 0 to {NUM_SEEDS - 1}")
    for setting in settings:
        if section_of(setting) in _FIXED:
            raise ValueError(
                f"{setting} says how weights were trained, and those of the run are what they are; expected no setting "
                f"of {' or '.join(_FIXED)}"
            )
    overrides = [override for override in settings if not _is_zero_temperature(override)]
    return ChatOptions(
        run_folder=run_folder,
        step=options.step,
        compare=options.compare,
        seed=options.seed,
        is_greedy=len(overrides) < len(settings),
        overrides=overrides,
    )


def _is_zero_temperature(override: str) -> bool:
    """sampling.temperature=0, which a run refuses and an answer does not."""
    key, _, value = override.partition("=")
    try:
        return key == _TEMPERATURE and float(value) == 0
    except ValueError:
        return False
