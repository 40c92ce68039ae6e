"""`python -m rlbench replay RUN`: sample recorded rollouts again, token for token, from the weights of their step."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rlbench.commands.command_line import CommandLine
from rlbench.commands.rescore import rollout_files
from rlbench.commands.run_step import checkpoint_folders
from rlbench.config.recorded import recorded_config
from rlbench.config.schema import RunConfig
from rlbench.models.fingerprint import is_of_bytes
from rlbench.records import Completion, Rollout, RolloutGroup
from rlbench.tracking.rollout_store import read_groups

if TYPE_CHECKING:
    from rlbench.build import Inputs, Parts
    from rlbench.training.checkpoint import Checkpoint

USAGE = "python -m rlbench replay RUN [--id ROLLOUT_ID | --count N] [key=value ...]"
DIFFERS = 1  # exit status


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One rollout, recorded and sampled again."""

    recorded: Rollout
    again: Completion

    @property
    def first_difference(self) -> int | None:
        """Index of the first token that differs, the shorter one's length if it is a prefix; None: identical."""
        old, new = self.recorded.completion.token_ids, self.again.token_ids
        if old == new:
            return None
        return next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))

    @property
    def logprob_gap(self) -> float:
        """Largest difference of the sampling logprobs before the first difference, in nats."""
        pairs = zip(self.recorded.completion.sampling_logprobs, self.again.sampling_logprobs, strict=False)
        gaps = [abs(old - new) for old, new in pairs][: self.first_difference]
        return max(gaps, default=0.0)


def replay(arguments: Sequence[str]) -> int:
    """Exit status: 0 if every rollout came out the same, 1 if one differs.

    Raises:
        ValueError: anything a user can get wrong, a missing checkpoint among them.
        TrackingError: a rollout file cannot be read.
    """
    run_folder, rollout_id, count, overrides = _parse(arguments)
    config = recorded_config(run_folder, overrides)
    chosen = _choose(run_folder, rollout_id, count, config.seed)
    checkpoints = _find_weights(run_folder, chosen)
    console = Console(highlight=False)

    from rlbench.build import build, prepare

    inputs = prepare(config)
    parts = build(inputs)
    if any(is_of_bytes(part.fingerprint) for part in chosen):
        console.print("note: an older rlbench took the run's fingerprints, so those of its weights are not compared")
    num_same = num_replayed = 0
    try:
        for found in _replay(inputs, parts, chosen, checkpoints):
            num_replayed += 1
            num_same += found.first_difference is None
            console.print(_line(found, inputs.tokenizer), markup=False, soft_wrap=True)
    finally:
        parts.close()
    console.print(f"{num_same} of {num_replayed} rollouts are identical")
    return 0 if num_same == num_replayed else DIFFERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Rollouts of one step that are to be sampled again."""

    groups: list[RolloutGroup]  # all of the step
    rollout_ids: set[str]

    @property
    def fingerprint(self) -> str:
        return self.groups[0].rollouts[0].completion.adapter_fingerprint


def _choose(run_folder: Path, rollout_id: str | None, count: int, seed: int) -> list[Chosen]:
    """By step; without an id, `count` at random of all that were recorded."""
    files = {int(file.stem.removeprefix("step-")): file for file in rollout_files(run_folder)}
    if rollout_id is not None:
        step = rollout_id.partition("/")[0]
        if not step.isdigit() or int(step) not in files:
            raise ValueError(
                f"--id is {rollout_id}, but no rollouts of its step were recorded; expected STEP/PROMPT_ID/INDEX with "
                f"a step of {min(files)} to {max(files)}, e.g. {_example(files[min(files)])}"
            )
        groups = read_groups(files[int(step)])
        if rollout_id not in {rollout.rollout_id for group in groups for rollout in group.rollouts}:
            raise ValueError(
                f"--id is {rollout_id}, which is not in {files[int(step)]}; expected e.g. {_example(files[int(step)])}"
            )
        return [Chosen(groups=groups, rollout_ids={rollout_id})]
    by_step = {step: read_groups(file) for step, file in files.items()}
    every = [(step, r.rollout_id) for step, groups in by_step.items() for group in groups for r in group.rollouts]
    drawn: dict[int, set[str]] = defaultdict(set)
    for step, name in random.Random(seed).sample(every, min(count, len(every))):
        drawn[step].add(name)
    return [Chosen(groups=by_step[step], rollout_ids=drawn[step]) for step in sorted(drawn)]


def _example(file: Path) -> str:
    return read_groups(file)[0].rollouts[0].rollout_id


def _find_weights(run_folder: Path, chosen: Sequence[Chosen]) -> dict[str, Checkpoint]:
    """By adapter fingerprint. Rollouts of the untrained adapter need none: it is made from the seed.

    Raises:
        ValueError: the weights of a step were not kept, or their checkpoint is damaged.
    """
    from rlbench.training.checkpoint import read_checkpoint

    folders = checkpoint_folders(run_folder).values()
    found = {}
    for folder in folders:
        checkpoint = read_checkpoint(folder)
        found[checkpoint.state["adapter_fingerprint"]] = checkpoint
    for part in chosen:
        completion = part.groups[0].rollouts[0].completion
        if completion.policy_version and part.fingerprint not in found:
            kept = ", ".join(folder.name for folder in folders) or "none"
            raise ValueError(
                f"rollout {min(part.rollout_ids)} was sampled by policy version {completion.policy_version}, of which "
                f"no checkpoint was kept (there are: {kept}); a run with checkpoint.every_steps=1 and "
                "checkpoint.keep_last as large as its number of steps can be replayed from any of them"
            )
    return found


def _replay(
    inputs: Inputs, parts: Parts, chosen: Sequence[Chosen], checkpoints: dict[str, Checkpoint]
) -> Iterator[Replayed]:
    from rlbench.training.checkpoint import restore
    from rlbench.weight_sync import sync

    for version, part in enumerate(chosen, start=1):
        checkpoint = checkpoints.get(part.fingerprint)
        if checkpoint is not None:
            restore(checkpoint, parts.policy, parts.optimizer)
        fingerprint = sync(parts.policy.weights(), parts.engine, version)
        if fingerprint != part.fingerprint and not is_of_bytes(part.fingerprint):
            raise ValueError(
                f"rollout {min(part.rollout_ids)} was sampled by an adapter with fingerprint {part.fingerprint[:12]}, "
                f"the one that was rebuilt has {fingerprint[:12]}: seed, lora.* or the code that makes it changed"
            )
        for batch in _batches(part, inputs.config):
            yield from _sample_again(inputs, parts, batch, part.rollout_ids)


def _batches(part: Chosen, config: RunConfig) -> list[list[RolloutGroup]]:
    """Groups that were sampled together: in bfloat16 a completion can depend on its neighbours' number.

    With refills the later batches are not on record; then each group is one.
    """
    first = config.algorithm.prompts_per_step or len(part.groups)
    batches = [part.groups[:first], *([group] for group in part.groups[first:])]
    return [batch for batch in batches if any(r.rollout_id in part.rollout_ids for g in batch for r in g.rollouts)]


def _sample_again(inputs: Inputs, parts: Parts, batch: Sequence[RolloutGroup], wanted: set[str]) -> Iterator[Replayed]:
    from rlbench.build import training_sampling

    rollouts = [rollout for group in batch for rollout in group.rollouts]
    completions = parts.engine.generate(
        [rollout.prompt.token_ids for rollout in rollouts],
        training_sampling(inputs),
        [rollout.completion.seed for rollout in rollouts],
    )
    for rollout, completion in zip(rollouts, completions, strict=True):
        if rollout.rollout_id in wanted:
            yield Replayed(recorded=rollout, again=completion)


def _line(found: Replayed, tokenizer: Any) -> str:
    from rlbench.tracking.safe_text import printable

    name, completion = found.recorded.rollout_id, found.recorded.completion
    where = found.first_difference
    gap = f"logprobs within {found.logprob_gap:.2g}"
    if where is None:
        return f"{name}: identical, {len(completion.token_ids)} tokens, {gap}"
    both = (completion.token_ids, found.again.token_ids)
    old, new = (repr(printable(tokenizer.decode(ids[where : where + 1]))) for ids in both)
    return f"{name}: differs at token {where}: {old} was recorded, now {new}; before it {gap}"


def command_line() -> CommandLine:
    line = CommandLine("replay", USAGE)
    line.add_argument("--id", help="one rollout, as the report and the files of rollouts name it")
    line.add_argument("--count", type=int, default=50, help="rollouts at random (default: 50)")
    return line


def _parse(arguments: Sequence[str]) -> tuple[Path, str | None, int, list[str]]:
    options, (run_folder,), overrides = command_line().split_places(arguments)
    if options.count < 1:
        raise ValueError(f"--count is {options.count}, expected at least 1")
    return run_folder, options.id, options.count, overrides
