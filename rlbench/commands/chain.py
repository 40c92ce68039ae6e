"""`python -m rlbench +exp=chain_...`: runs one after the other, each starting from the last one's adapter.

outputs/<name>/<time>/
    chain.json      what is finished: name, folder, SHA-256 of the adapter
    1_sft/ 2_grpo/  each the folder of a run
"""

from __future__ import annotations

import gc
import signal
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

from rich.text import Text

from rlbench.commands.chain_record import RECORD_NAME, ChainRecord
from rlbench.commands.resume_command import own_overrides, resume_command
from rlbench.commands.stages import load_stage
from rlbench.commands.train import remove_if_unused, run_training
from rlbench.config.chain import stage_configs, stage_name
from rlbench.config.recorded import trained_settings
from rlbench.config.resume import check_resumable, keep_derived
from rlbench.config.schema import AUTO, RunConfig
from rlbench.tracking.console import RunConsole
from rlbench.tracking.formats import format_duration
from rlbench.tracking.jsonl import read_metrics
from rlbench.tracking.run_summary import learning_lines


def chain(config: RunConfig, notes: Sequence[str]) -> int:
    """Run all stages that are not finished; the exit status is that of the stage that stopped, or 0.

    Raises:
        ValueError: a mistake of the user, in any stage's settings, before the first stage begins.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    hydra_folder = Path(hydra.runtime.output_dir)
    console = RunConsole(quiet=config.tracking.quiet)
    for note in notes:
        console.note(note)
    try:
        configs = stage_configs(config, hydra.overrides.task)
        folder = _find_folder(config.resume, hydra_folder, console)
        record = ChainRecord.open(folder, [stage.name for stage in config.chain])
        _check_stages(config, configs, record, console)
    except (ValueError, KeyboardInterrupt):
        remove_if_unused(hydra_folder)
        raise
    if folder != hydra_folder:
        remove_if_unused(hydra_folder)
    record.write()
    start = time.monotonic()
    for index in range(record.num_finished, len(configs)):
        status = _run_stage(config, configs[index], index, record, console)
        if status != 0:
            return status
    _summarise(config, configs, record, time.monotonic() - start, console)
    return 0


def _run_stage(config: RunConfig, stage: RunConfig, index: int, record: ChainRecord, console: RunConsole) -> int:
    run_folder, place = record.folders[index], f"{index + 1} of {len(config.chain)}, {config.chain[index].name}"
    console.note(f"\nchain: stage {place}, in {run_folder}")
    if index > 0:
        stage.lora.init_from = str(record.folders[index - 1])
    if record.has_checkpoint(index):
        stage.resume = str(run_folder)
    else:
        record.clear(index)  # stopped before its first checkpoint: begins again
    try:
        status = run_training(stage, [], run_folder, is_in_chain=True)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except ValueError as error:
        raise ValueError(f"{stage_name(config.chain, index)}: {error}; {_go_on(record)}") from error
    if status == 0:
        record.finish(index)
    else:
        print(f"the chain stopped in stage {place}; {_go_on(record)}", file=sys.stderr)
    free_memory()
    return status


def _go_on(record: ChainRecord) -> str:
    return f"to go on: {resume_command(record.folder, own_overrides())}"


def _check_stages(config: RunConfig, configs: Sequence[RunConfig], record: ChainRecord, console: RunConsole) -> None:
    """Read each stage's data and settings as its run will, on a copy, and start its rewards once.

    Raises:
        ValueError: a stage cannot run; it is named. Or a finished one had other settings.
    """
    for index, stage in enumerate(configs):
        trial, name = deepcopy(stage), stage_name(config.chain, index)
        with console.phase(f"checking {name}"):
            try:
                if index < record.num_finished:
                    for line in _changes(trial, index, record):
                        console.warning(f"{name} is finished and keeps its result: {line}")
                    continue
                inputs = load_stage(trial.stage).prepare(trial)
                if trial.stage == "rl":
                    from rlbench.rollouts.score import Scorer

                    Scorer(trial.rewards, columns=list(inputs.train.prompts[0].columns)).close()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def _changes(trial: RunConfig, index: int, record: ChainRecord) -> list[str]:
    run_folder = record.folders[index]
    keep_derived(trial, record.derived(index))
    saved = trained_settings(run_folder)
    trial.lora.init_from = saved["lora"]["init_from"]
    return [line.partition(":")[0] for line in check_resumable(saved, asdict(trial))]


def _find_folder(resume: str | None, hydra_folder: Path, console: RunConsole) -> Path:
    """The chain's folder: a new one, or that of `resume`: the folder itself, or a place in it.

    Raises:
        ValueError: `resume` names no chain, or a new one would overwrite another.
    """
    if resume is None:
        if (hydra_folder / RECORD_NAME).exists():
            raise ValueError(f"{hydra_folder} holds a chain; expected resume={hydra_folder}, or another hydra.run.dir")
        return hydra_folder
    if resume == AUTO:
        records = sorted(hydra_folder.parent.glob(f"*/{RECORD_NAME}"), key=lambda file: file.stat().st_mtime)
        folder = records[-1].parent if records else hydra_folder
        console.note(f"resume=auto: {f'going on with {folder}' if records else 'a new chain begins'}")
        return folder
    place = Path(resume).expanduser().resolve()
    folder = next((f for f in (place, *place.parents) if (f / RECORD_NAME).is_file()), None)
    if folder is None:
        raise ValueError(f"resume is {resume}, but no {RECORD_NAME} is there; expected the folder of a chain, or auto")
    return folder


def free_memory() -> None:
    """What loads a base after this has the memory of the last one."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _summarise(
    config: RunConfig, configs: Sequence[RunConfig], record: ChainRecord, seconds: float, console: RunConsole
) -> None:
    lines = [f"\nChain of {len(configs)} stages finished in {format_duration(seconds)}."]
    for index, (entry, stage) in enumerate(zip(config.chain, configs, strict=True)):
        folder = record.folders[index]
        history = list(read_metrics(folder / "metrics.jsonl", "train"))
        report = folder / "report.html"
        lines.append(f"Stage {index + 1}, {entry.name}: {len(history)} steps")
        lines += [f"  {line}" for line in learning_lines(history, load_stage(stage.stage).learned)]
        lines.append(f"  adapter  {folder / 'adapter'}")
        lines.append(f"  report   {report if report.is_file() else 'none was written'}")
    console.show(Text("\n".join(lines)))
