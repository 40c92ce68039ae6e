"""`python -m rlbench train`: plan, run, summarise, and say in one sentence what went wrong."""

from __future__ import annotations

import json
import shlex
import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlbench.commands.report import try_report
from rlbench.commands.resume_command import own_overrides, resume_command
from rlbench.commands.stages import Stage, load_stage
from rlbench.config.full_training import high_lr_note
from rlbench.config.recorded import trained_settings
from rlbench.config.resume import check_resumable, keep_derived
from rlbench.config.schema import AUTO, RunConfig
from rlbench.tracking.console import RunConsole
from rlbench.tracking.environment import command_line, environment
from rlbench.tracking.errors import TrackingError
from rlbench.tracking.jsonl import JsonlWriter, read_metrics
from rlbench.tracking.run_lock import RunLock
from rlbench.tracking.run_log import NAME as LOG_NAME
from rlbench.tracking.tensorboard_tracker import TensorboardTracker, check_tensorboard
from rlbench.tracking.tracker import Tracker
from rlbench.tracking.wandb_tracker import WandbTracker
from rlbench.tracking.whole_file import replace_folder, write_whole

if TYPE_CHECKING:
    from rlbench.build import BaseInputs, BaseParts
    from rlbench.loops.training_loop import TrainingLoop
    from rlbench.loops.watchdog import Watchdog
    from rlbench.training.checkpoint import Checkpoint


def train(config: RunConfig, notes: Sequence[str]) -> int:
    """Run the whole job; the exit status is 0, 128 + signal, or 3 to 10 for a run that had to stop.

    Raises:
        ValueError: a mistake of the user.
        KeyboardInterrupt: stopped before the loop began.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra_folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        return run_training(config, notes, hydra_folder)
    except (ValueError, KeyboardInterrupt):
        remove_if_unused(hydra_folder)
        raise


def run_training(config: RunConfig, notes: Sequence[str], folder: Path, *, is_in_chain: bool = False) -> int:
    """As `train`, in `folder`; a run in a chain leaves it to the chain to say what comes next."""
    if config.tracking.tensorboard:
        check_tensorboard()
    console = RunConsole(quiet=config.tracking.quiet)
    for note in notes:
        console.note(note)
    checkpoint, run_folder = _find_resume(config, folder, console)
    begins_again = config.resume is not None and _must_begin_again(run_folder)
    if checkpoint is None and not begins_again and (run_folder / "metrics.jsonl").exists():
        raise ValueError(f"{run_folder} holds a run; expected resume={run_folder}, or another hydra.run.dir")
    if checkpoint is not None:
        kept = keep_derived(config, json.loads((run_folder / "derived.json").read_text()))
        console.note(f"kept from the run that is resumed: {', '.join(kept) or 'nothing'}")
    with console.phase("reading data and model"):
        stage = load_stage(config.stage)
        inputs = stage.prepare(config)
    console.plan(stage.plan_rows(inputs, run_folder))
    too_high = high_lr_note(config)
    if too_high:
        console.warning(f"optim.lr is {config.optim.lr:g}, {too_high}: add optim.lr=null unless you mean it")
    console.opening(f"{config.name}: {config.training.num_steps} steps, {inputs.model.name}, files in {run_folder}")
    if checkpoint is not None:
        for line in check_resumable(trained_settings(run_folder), asdict(config)):
            console.warning(line)
        num_steps = config.training.num_steps or 0
        if checkpoint.step > num_steps:
            raise ValueError(
                f"training.num_steps is {num_steps}, but {checkpoint.step} steps are done in {checkpoint.folder}; "
                "expected at least as many"
            )
    with console.phase("loading the model"):
        parts = stage.build(inputs)
    if parts.policy.patched:
        console.note(f"the trainer computes through Triton kernels: {parts.policy.patched}")
    if inputs.config.hardware.profile == "gpu":
        from rlbench.models.attention import scoring_features
        from rlbench_kernels.packed_attention import describe_backend

        features = scoring_features(parts.base.config.get_text_config())
        console.note(f"the trainer's attention: {describe_backend(parts.policy.device, **features)}")
    from rlbench.loops.stopping import StopRequest
    from rlbench.loops.watchdog import Watchdog

    stop = StopRequest(console.warning, config.training.stop_grace_s)
    watchdog = Watchdog(config.watchdog, stop, run_folder)
    try:
        return _run(stage, inputs, parts, checkpoint, run_folder, console, watchdog, is_in_chain)
    finally:
        parts.close()
        watchdog.close()


def _run(
    stage: Stage,
    inputs: BaseInputs,
    parts: BaseParts,
    checkpoint: Checkpoint | None,
    run_folder: Path,
    console: RunConsole,
    watchdog: Watchdog,
    is_in_chain: bool,
) -> int:
    from rlbench.checks.drift import DriftError
    from rlbench.checks.policy_identity import PolicyIdentityError
    from rlbench.engine.interface import EngineCorruptedError, EngineDeadError
    from rlbench.loops.stopping import StepAbandoned
    from rlbench.loops.training_loop import NonFiniteError
    from rlbench.rollouts.credit import RewardFailure
    from rlbench.training.microbatch_budget import RunMemoryError

    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(run_folder)
        console.log.open(run_folder / LOG_NAME, f"--- {time.strftime('%Y-%m-%d %H:%M:%S%z')} {command_line()}")
        tracker = _tracker(inputs, checkpoint, run_folder, console)
    except (TrackingError, OSError) as error:
        console.error(f"error: {error}")
        return 4
    if checkpoint is None:
        _plan_memory(inputs, parts, run_folder, console)
    stop = watchdog.stop
    loop = stage.load_loop()(
        inputs=inputs,
        parts=parts,
        tracker=tracker,
        console=console,
        run_folder=run_folder,
        stop=stop,
        watchdog=watchdog,
    )
    failures: dict[type[Exception], int] = {
        EngineDeadError: 10,
        RunMemoryError: 8,
        NonFiniteError: 3,
        TrackingError: 4,
        RewardFailure: 5,
        PolicyIdentityError: 6,
        DriftError: 6,
        EngineCorruptedError: 6,
    }
    start = time.monotonic()
    try:
        if checkpoint is not None:
            loop.resume(checkpoint)
            loop.history = list(read_metrics(run_folder / "metrics.jsonl", "train"))
            console.note(f"resumed from {checkpoint.folder}: {loop.step} steps are done")
        with stop, watchdog:
            loop.run()
        is_done = stop.signal_number is None
        result = None
        if is_done:
            result = _save_result(parts, run_folder, inputs.model.name)
        _summarise(
            loop,
            stage.learned,
            console,
            report=_report(run_folder, console),
            result=result,
            is_in_chain=is_in_chain,
            seconds=time.monotonic() - start,
        )
        return 0 if is_done else stop.exit_status
    except KeyboardInterrupt:
        console.error(f"stopped in step {loop.step + 1} without saving; {_go_on(loop)}")
        return stop.exit_status
    except StepAbandoned as abandoned:
        console.error(f"error: step {loop.step + 1}: {abandoned}; {_go_on(loop)}")
        _report(run_folder, console)
        return abandoned.exit_status
    except tuple(failures) as error:
        where = f"; its traceback: {_keep_traceback(error, run_folder)}" if isinstance(error, EngineDeadError) else ""
        console.error(f"error: step {loop.step + 1}: {error}{where}; {_go_on(loop)}")
        if report := _report(run_folder, console):
            console.error(f"what happened until then: {report}")
        return failures[type(error)]
    finally:
        tracker.close()
        console.log.close()
        lock.release()


def _save_result(parts: BaseParts, run_folder: Path, base_name: str) -> Path:
    """What was trained, whole under its name or not at all; one that a run before left is replaced.

    Raises:
        TrackingError: it cannot be written.
    """
    from safetensors import SafetensorError

    staging = run_folder / ".result.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        written = parts.policy.save_result(staging, base_name)
        replace_folder(written, run_folder / written.name)
        return run_folder / written.name
    except OSError as error:
        raise TrackingError.from_os_error("write the weights that were trained to", run_folder, error) from error
    except SafetensorError as error:  # its writer's way to say what OSError says: disk full
        raise TrackingError(f"cannot write the weights that were trained to {run_folder}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _go_on(loop: TrainingLoop) -> str:
    return f"to go on: resume={loop.last_checkpoint}" if loop.last_checkpoint else "no checkpoint was written yet"


def _keep_traceback(error: BaseException, run_folder: Path) -> Path:
    path = run_folder / "engine_error.txt"
    path.write_text("".join(traceback.format_exception(error)))
    return path


def _tracker(inputs: BaseInputs, checkpoint: Checkpoint | None, run_folder: Path, console: RunConsole) -> Tracker:
    config = inputs.config
    steps_done = checkpoint.step if checkpoint else 0
    jsonl = _metrics_file(checkpoint, run_folder, console)
    plain = asdict(config)
    write_whole(run_folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False))
    write_whole(run_folder / "environment.json", json.dumps(environment(), indent=1))
    if checkpoint is None:
        reasons = {d.key: {"value": d.value, "reason": d.reason} for d in inputs.derived}
        write_whole(run_folder / "derived.json", json.dumps(reasons, indent=1))
        write_whole(run_folder / "overrides.yaml", yaml.safe_dump(own_overrides()))
    wandb = WandbTracker(
        config.tracking.wandb,
        config.tracking.wandb_project,
        run_folder.name,
        run_folder,
        plain,
        run_id=checkpoint.state.get("wandb_run_id") if checkpoint else None,
        tags=[config.name],
        warn=console.warning,
    )
    tensorboard = TensorboardTracker(run_folder, steps_done) if config.tracking.tensorboard else None
    return Tracker(jsonl, config.training.num_steps or 0, wandb, console, steps_done, tensorboard)


def _metrics_file(checkpoint: Checkpoint | None, run_folder: Path, console: RunConsole) -> JsonlWriter:
    """Opened where the run goes on; what came later, in other files too, goes first, and whole checkpoints aside."""
    path = run_folder / "metrics.jsonl"
    if checkpoint is None and not _must_begin_again(run_folder):
        return JsonlWriter(path)
    from rlbench.tracking.rollout_store import cut_rollouts
    from rlbench.training.checkpoint import set_aside_later

    step = evaluated_to = -1
    if checkpoint is not None:
        step = checkpoint.step
        evaluated_to = max((int(e["step"]) for e in checkpoint.state["evaluations"]), default=-1)
        for what in set_aside_later(run_folder, step):
            console.note(f"the run goes on from step {step}: checkpoint {what}")
    cut_rollouts(run_folder, step, evaluated_to)
    return JsonlWriter(path, resume_from_step=step, evaluated_to=evaluated_to)


def _plan_memory(inputs: BaseInputs, parts: BaseParts, run_folder: Path, console: RunConsole) -> None:
    from rlbench.planner.run_plan import write_run_plan

    problem = write_run_plan(inputs, parts, run_folder)
    if problem:
        console.note(problem)


def _find_resume(config: RunConfig, hydra_folder: Path, console: RunConsole) -> tuple[Checkpoint | None, Path]:
    """The checkpoint to go on from, if any, and the folder of this run."""
    if config.resume is None:
        return None, hydra_folder
    if config.resume == AUTO:
        return _newest_run(hydra_folder, console)
    place = Path(config.resume).expanduser()
    if not place.is_dir():
        raise ValueError(
            f"resume is {config.resume}, but there is no such folder; expected a run's folder or one of its checkpoints"
        )
    if _must_begin_again(place):
        console.note(f"{place} has no checkpoint yet: the run begins again, and what it had recorded goes")
        remove_if_unused(hydra_folder)
        return None, place
    from rlbench.training.checkpoint import find_checkpoint

    checkpoint, damaged = find_checkpoint(place)
    for line in damaged:
        console.warning(f"{line}; an older checkpoint is taken")
    remove_if_unused(hydra_folder)
    return checkpoint, checkpoint.folder.parent.parent


def _newest_run(hydra_folder: Path, console: RunConsole) -> tuple[Checkpoint | None, Path]:
    """For resume=auto: this folder's newest valid checkpoint, else that of the runs beside it, newest first."""
    if _must_begin_again(hydra_folder):
        console.note(f"resume=auto: {hydra_folder} has no checkpoint yet: its run begins again")
        return None, hydra_folder
    from rlbench.training.checkpoint import find_checkpoint

    beside = {file.parents[2] for file in hydra_folder.parent.glob("*/checkpoints/step-*/manifest.json")}
    others = sorted(beside - {hydra_folder}, key=lambda folder: (folder / "checkpoints").stat().st_mtime, reverse=True)
    for run_folder in [hydra_folder, *others]:
        if not (run_folder / "checkpoints").is_dir():
            continue
        try:
            checkpoint, damaged = find_checkpoint(run_folder)
        except ValueError as error:
            console.warning(f"{run_folder} is passed over: {error}")
            continue
        for line in damaged:
            console.warning(f"{line}; an older checkpoint is taken")
        console.note(f"resume=auto: going on with {run_folder}, {checkpoint.step} steps are done")
        if run_folder != hydra_folder:
            remove_if_unused(hydra_folder)
        return checkpoint, run_folder
    console.note(f"resume=auto: no run in {hydra_folder.parent} has a checkpoint; a new run begins")
    return None, hydra_folder


def _must_begin_again(folder: Path) -> bool:
    """Whether a run began there and was killed before its first checkpoint: one that came to an end has a report."""
    if not (folder / "metrics.jsonl").is_file() or (folder / "report.html").exists():
        return False
    from rlbench.training.checkpoint import has_checkpoint

    return not has_checkpoint(folder)


def remove_if_unused(folder: Path) -> None:
    """Hydra made a folder before we knew that nothing would be written there."""
    if folder.is_dir() and not any(folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)
        for parent in folder.parents[:2]:  # outputs/<name>, if this was all that it held
            if parent != Path.cwd() and not any(parent.iterdir()):
                parent.rmdir()


def _report(run_folder: Path, console: RunConsole) -> Path | None:
    """The run's page; where it cannot be made, one line says so and the run goes on to its end."""
    path, problem = try_report(run_folder)
    if path is None:
        console.warning(problem)
    return path


def _summarise(
    loop: TrainingLoop,
    learned: Mapping[str, str],
    console: RunConsole,
    *,
    report: Path | None,
    result: Path | None,
    is_in_chain: bool,
    seconds: float,
) -> None:
    from rlbench.tracking.formats import format_duration

    folder = loop.run_folder
    config = loop.inputs.config
    files = {"metrics": folder / "metrics.jsonl", "checkpoint": loop.last_checkpoint or "none"}
    if report is not None:
        files["report"] = report
    if config.stage == "rl" and config.tracking.save_rollouts:
        files["rollouts"] = folder / "rollouts"
    if result is not None:
        files[result.name] = result
    has_no_more = result is not None and config.engine.kind == "recorded"  # what was recorded has no further steps
    commands = [] if is_in_chain or has_no_more else [_next_command(loop, is_done=result is not None)]
    if not is_in_chain and result is not None and config.stage != "reward_model":
        own = shlex.join(["python", "-m", "rlbench", "chat", str(folder)])
        commands.append(f"{own}   # talk with it")
        own = shlex.join(["python", "-m", "rlbench", "export", str(folder), str(folder / "exported")])
        commands.append(f"{own}   # one folder for transformers and vLLM")
    wandb = loop.tracker.wandb
    if wandb is not None and wandb.mode == "offline":
        commands.append(f"wandb sync {folder}/wandb/offline-run-*   # upload this run to wandb")
    verb = "Stopped after" if result is None else "Finished"
    console.summary(
        history=loop.history,
        headline=f"{verb} {loop.step} step{'s' * (loop.step != 1)} in {format_duration(seconds)}.",
        accuracy=_accuracy_change(loop),
        sampled=_sampled_change(loop),
        learned=learned,
        files=files,
        findings=_finding_lines(loop),
        next_commands=commands,
    )


def _next_command(loop: TrainingLoop, *, is_done: bool) -> str:
    if is_done:
        twice = {"training.num_steps": 2 * loop.step}
        return f"{resume_command(loop.run_folder, own_overrides(), twice)}   # train on"
    return f"{resume_command(loop.run_folder, own_overrides())}   # go on"


def _finding_lines(loop: TrainingLoop) -> list[str]:
    from rlbench.checks.health import RULES, find_problems
    from rlbench.checks.health_watch import finding_line

    evaluations = [{"step": e.step, **e.metrics} for e in loop.evaluations]
    found = find_problems(loop.history, evaluations, asdict(loop.inputs.config))
    return [f"{f.severity}: {finding_line(f)}" for f in found] or [f"none of the {len(RULES)} rules found anything"]


def _sampled_change(loop: TrainingLoop) -> str:
    from rlbench.loops.evaluate import sampled_text

    text = (
        sampled_text(loop.evaluations[-1].metrics, loop.inputs.config.evaluation.num_samples)
        if loop.evaluations
        else ""
    )
    return text and f"{text[0].upper()}{text[1:]}."


def _accuracy_change(loop: TrainingLoop) -> Any:
    from rlbench.tracking.run_summary import AccuracyChange

    if len(loop.evaluations) < 2 or not loop.evaluations[0].is_correct:
        return None
    before, after = loop.evaluations[0], loop.evaluations[-1]
    both = before.is_correct.keys() & after.is_correct.keys()
    return AccuracyChange(
        name="held-out problems",
        correct_before=before.num_correct,
        num_before=len(before.is_correct),
        correct_after=after.num_correct,
        num_after=len(after.is_correct),
        num_gained=sum(after.is_correct[p] and not before.is_correct[p] for p in both),
        num_lost=sum(before.is_correct[p] and not after.is_correct[p] for p in both),
    )
