"""`python -m rlbench [command] [overrides]`: find the command, compose its config with Hydra, run it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import rlbench
from rlbench.models.allocator import use_expandable_segments

COMMANDS = {
    "train": "train a policy (the default)",
    "plan": "memory by part and time by phase of a run before it starts, from short probes on this device",
    "explain": "explain +exp=... [KEY ...]: every setting of a run, where it comes from, and what a key means",
    "doctor": "what is usable on this machine, and the command that fixes what is not",
    "preflight": "sample the untrained policy as the run would: is there a signal, what does a step cost, go or no-go",
    "eval": "eval RUN: a policy's answers to held-out prompts, of any data, alone or beside the base or another run",
    "replay": "replay RUN: sample recorded rollouts again, token for token, and say where they differ",
    "rescore": "rescore RUN: other rewards on recorded rollouts, and how the advantages would have changed",
    "export": "export RUN DEST: what a run trained as one folder for transformers and vLLM, compared with its policy",
    "chat": "chat RUN: talk with the policy of a run, at any step that was kept, beside the base if asked",
    "serve": "serve RUN: vLLM's OpenAI-compatible server with the run's adapter",
    "report": "report RUN [RUN2 ...]: curves, samples and health findings of a run as one HTML file, or a comparison",
    "diff": "diff RUN_A RUN_B: settings, numbers, curves and samples of two runs, finished or not, side by side",
    "sandbox": "sandbox doctor: show what isolates model-written code on this machine",
    "reward": "reward test: try the configured rewards on unit cases, attacks and the data's gold answers",
}
_HELPED = {  # commands whose module in rlbench.commands has a command_line; report and diff print theirs
    **{
        name: name
        for name in (
            "explain",
            "doctor",
            "preflight",
            "eval",
            "replay",
            "rescore",
            "chat",
            "serve",
            "sandbox",
            "reward",
        )
    },
    "plan": "plan_memory",
    "export": "export_run",
}
_WITHOUT_A_JOB = ("replay", "rescore", "export", "chat", "serve", "explain")  # each a function of its name's module
_SIGNALLED = 128  # plus the signal's number: exit status of a run that a signal ended

_HELP = """rlbench: reinforcement learning for reasoning language models

usage: python -m rlbench [command] [overrides]

commands (COMMAND --help: its own options)
{commands}

examples
  python -m rlbench +exp=grpo_gsm8k                                   one run
  python -m rlbench +exp=grpo_gsm8k optim.lr=3e-5 training.num_steps=50
  python -m rlbench -m +exp=grpo_gsm8k optim.lr=1e-5,3e-5 seed=1,2,3  a sweep
  python -m rlbench +exp=grpo_gsm8k --cfg job                         show the composed config, run nothing
  python -m rlbench +exp=grpo_gsm8k resume=outputs/grpo_gsm8k/...     go on with a stopped run (auto: the newest)

experiments (+exp=...): {experiments}
config groups (group=choice)
{groups}

Every key and its default: python -m rlbench --cfg job. Hydra's own options: python -m rlbench --hydra-help
"""


def main() -> None:
    # peft imports bitsandbytes, whose CPU part looks for a package `kernels` and takes our folder for it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda r: "gemm_4bit_forward" not in r.getMessage())
    arguments = sys.argv[1:]
    is_named = (
        bool(arguments)
        and not any(sign in arguments[0] for sign in "=.")
        and not arguments[0].startswith(("-", "+", "~"))
    )
    command, arguments = (arguments[0], arguments[1:]) if is_named else ("train", arguments)
    if command != "help" and command not in COMMANDS:
        _fail_unknown_command(command)
    if command != "serve":  # which becomes vLLM's server, with the environment that it prints
        use_expandable_segments()
    if command in _HELPED and is_help_wanted(arguments):
        print(command_help(command))
        return
    if command == "report":
        from rlbench.commands.report import report

        sys.exit(report(arguments))
    if command == "diff":
        from rlbench.commands.diff import diff

        sys.exit(diff(arguments))
    if command == "doctor":
        from rlbench.commands.doctor import doctor

        sys.exit(doctor(arguments))
    if command == "help" or is_help_wanted(arguments):
        print(help_text())
        return
    if "--version" in arguments:
        print(f"rlbench {rlbench.__version__}")
        return
    if command == "sandbox":
        from rlbench.commands.sandbox import sandbox

        sys.exit(sandbox(arguments))
    if command == "reward":
        sys.exit(_reward(arguments))
    if command == "plan":
        from rlbench.commands.plan_memory import plan, with_folder

        sys.exit(_run_with_hydra(with_folder(arguments), plan))
    if command == "preflight":
        sys.exit(_preflight(arguments))
    if command == "eval":
        sys.exit(_eval(arguments))
    if command in _WITHOUT_A_JOB:
        action = getattr(import_module(f"rlbench.commands.{command}"), command)
        sys.exit(_without_a_job(action, arguments))
    sys.exit(_run_with_hydra(arguments))


def _without_a_job(action: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Commands that take overrides but make no folder of Hydra's."""
    from rlbench.config.compose import CONFIG_ERRORS, explain_config_error
    from rlbench.config.own_errors import is_raised_by_us
    from rlbench.tracking.errors import FILE_STATUS, TrackingError

    try:
        return action(arguments)
    except CONFIG_ERRORS as error:
        return _fail(explain_config_error(error, arguments))
    except TrackingError as error:
        return _fail(str(error), FILE_STATUS)
    except ValueError as error:
        if not is_raised_by_us(error):
            raise
        return _fail(str(error))


def _reward(arguments: list[str]) -> int:
    from rlbench.commands.reward import reward_test, split_arguments

    try:
        options, overrides = split_arguments(arguments)
    except ValueError as error:
        return _fail(str(error))
    # A trial writes no files: Hydra's folder is one that is thrown away.
    with tempfile.TemporaryDirectory() as folder:
        return _run_with_hydra([*overrides, f"hydra.run.dir={folder}"], lambda config, _: reward_test(config, options))


def _eval(arguments: list[str]) -> int:
    from rlbench.commands import eval as command

    try:
        options = command.parse(arguments)
    except ValueError as error:
        return _fail(str(error))
    if options.run_folder is not None:
        return _without_a_job(lambda _: command.eval_run(options), options.overrides)
    overrides = command.overrides_for_hydra(options)
    return _run_with_hydra(overrides, lambda config, notes: command.eval_untrained(config, notes, options))


def _preflight(arguments: list[str]) -> int:
    from rlbench.commands.preflight import preflight, split_arguments

    try:
        options, overrides = split_arguments(arguments)
    except ValueError as error:
        return _fail(str(error))
    return _run_with_hydra(overrides, lambda config, notes: preflight(config, notes, options))


def is_help_wanted(arguments: Sequence[str]) -> bool:
    """Not behind --, where another program's options stand."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return any(argument in ("-h", "--help") for argument in own)


def command_help(command: str) -> str:
    """What one command does, how it is called, and its options."""
    module = import_module(f"rlbench.commands.{_HELPED[command]}")
    return f"{COMMANDS[command]}\n\n{module.command_line().format_help()}".rstrip()


def help_text() -> str:
    from rlbench.config.compose import group_choices, group_names

    groups = [name for name in group_names() if name != "exp"]
    return _HELP.format(
        commands="\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items()),
        experiments=", ".join(group_choices("exp")),
        groups="\n".join(f"  {name:10} {', '.join(group_choices(name))}" for name in groups),
    )


def _run_with_hydra(arguments: list[str], action: Callable[[Any, list[str]], int] | None = None) -> int:
    """Exit status of the action (default: train): 0 done, 2 the user's mistake, else as the action says."""
    import hydra

    from rlbench.commands.sweep import RunFailed
    from rlbench.config.compose import (
        CONFIG_ERRORS,
        config_folder,
        explain_config_error,
        explain_dashed_setting,
        register_schema,
        resolve_model_shorthand,
    )

    register_schema()
    dashed = explain_dashed_setting(arguments)
    if dashed:
        return _fail(dashed)
    arguments, notes = resolve_model_shorthand(arguments)
    # Hydra prints its own traceback and exits unless this is set; we turn its exceptions into one sentence.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    statuses: list[int] = []
    main_process = os.getpid()

    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")
    def run(composed: Any) -> float | None:
        # No error may leave this function: Hydra would print about it in its own words.
        statuses.append(_run_command(composed, notes, action))
        if statuses[-1] > _SIGNALLED:
            raise KeyboardInterrupt  # a stopped run ends its sweep
        if statuses[-1] and os.getpid() != main_process:
            raise RunFailed(statuses[-1])  # a launcher's process: `statuses` is a copy there
        return _objective(composed) if action is None else None

    # Hydra's parser takes no settings after an option that stands between them.
    sweeps = [argument for argument in arguments if argument in ("-m", "--multirun")]
    sys.argv = ["rlbench", *sweeps, *(argument for argument in arguments if argument not in sweeps)]
    try:
        run()
    except KeyboardInterrupt:
        if not statuses or statuses[-1] <= _SIGNALLED:
            print("stopped before the first step; nothing was saved", file=sys.stderr)
            return _SIGNALLED + signal.SIGINT
    except RunFailed as error:
        return error.args[0]
    except CONFIG_ERRORS as error:
        return _fail(explain_config_error(error, arguments))
    except OSError as error:
        return _fail(
            f"cannot make the run's folder ({error}); hydra.run.dir={error.filename or '...'} must be writable"
        )
    return max(statuses, default=0)


def _objective(composed: Any) -> float | None:
    """For a sweeper that optimizes: the number that tracking.objective names; None outside such a sweep."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    if "BasicSweeper" in hydra.sweeper._target_ or "MULTIRUN" not in str(hydra.mode):
        return None
    from rlbench.commands.sweep import sweep_objective

    return sweep_objective(Path(hydra.runtime.output_dir), composed.tracking.objective)


def _run_command(composed: Any, notes: list[str], action: Callable[[Any, list[str]], int] | None) -> int:
    from rlbench.config.compose import to_run_config
    from rlbench.config.own_errors import is_raised_by_us

    try:
        config = to_run_config(composed)
        if action is not None:
            if config.chain:
                raise ValueError(f"this command takes one run, but chain has {len(config.chain)} stages; expected none")
            return action(config, notes)
        if config.chain:
            from rlbench.commands.chain import chain

            return chain(config, notes)
        from rlbench.commands.train import train

        return train(config, notes)
    except ValueError as error:
        if is_raised_by_us(error):
            return _fail(str(error))
        traceback.print_exc()
    except Exception:
        traceback.print_exc()
    return 1


def _fail(sentence: str, status: int = 2) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return status


def _fail_unknown_command(command: str) -> None:
    from rlbench.config.checks import nearest

    guess = nearest(command, COMMANDS, count=1)
    hint = f"; did you mean {guess[0]}?" if guess else ""
    sys.exit(_fail(f"there is no command {command!r}, expected one of: {', '.join(COMMANDS)}{hint}"))


if __name__ == "__main__":
    main()
