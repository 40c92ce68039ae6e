"""Short measured probes of a run on given rows: its own loop's updates at several sizes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlbench.build import BaseInputs, BaseParts
from rlbench.data.stream import PromptStream
from rlbench.loops.offline import OfflineLoop
from rlbench.loops.stopping import StopRequest
from rlbench.loops.watchdog import Watchdog
from rlbench.models.base import storage_bytes
from rlbench.planner.probes import SHARES, Probe, Probes, head_bytes, is_safe, with_origin
from rlbench.planner.step_work import adapter_bytes, all_moments, beside_weights
from rlbench.tracking.console import RunConsole
from rlbench.tracking.device_memory import DeviceMemory, watch
from rlbench.tracking.jsonl import JsonlWriter
from rlbench.tracking.tracker import Tracker
from rlbench.training.optim import set_lr

_CANDIDATES = 16  # steps with the most tokens, which are packed to find the largest microbatch


@contextmanager
def probed_loop(
    loop: Callable[..., Any], inputs: BaseInputs, parts: BaseParts, console: RunConsole
) -> Iterator[OfflineLoop[Any, Any]]:
    """One made of the class `loop`, whose record goes nowhere."""
    with tempfile.TemporaryDirectory() as folder:
        stop = StopRequest(console.warning, inputs.config.training.stop_grace_s)
        watchdog = Watchdog(inputs.config.watchdog, stop, Path(folder))
        jsonl = JsonlWriter(Path(folder) / "metrics.jsonl")
        try:
            yield loop(
                inputs=inputs,
                parts=parts,
                tracker=Tracker(jsonl, inputs.config.training.num_steps or 0),
                console=console,
                run_folder=Path(folder),
                stop=stop,
                watchdog=watchdog,
            )
        finally:
            watchdog.close()
            jsonl.close()


def run_offline_probes(loop: OfflineLoop[Any, Any], memory: DeviceMemory) -> Probes:
    """Measure. The optimizer gets its state; the policy stays as it was (learning rate 0)."""
    parts = loop.parts
    limit = memory.limit()  # before moments, of which paged ones can leave the device
    steps = largest_steps(loop)
    rows, largest = max(((rows, max(sizes)) for rows, sizes in steps), key=lambda found: found[1])
    _, longest = max(steps, key=lambda step: sum(step[1]))
    set_lr(parts.optimizer, 0.0)
    subsets = _subsets(loop, rows, largest)
    loop.work_on(subsets[0])  # warm-up; makes the optimizer's state
    memory.settle()
    warm = memory.held()
    update = with_origin([_probe(loop, memory, subset) for subset in subsets], warm)
    if largest > update[-1].size and is_safe(update, warm, largest, limit):
        update.append(_probe(loop, memory, rows))
    return Probes(
        base_bytes=storage_bytes(parts.base),
        adapter_bytes=adapter_bytes(parts),
        kv_bytes_per_token=0,
        step_tokens=sum(longest),
        microbatch_tokens=largest,
        num_microbatches=len(longest),
        generation=[],
        warm_bytes=warm,
        update=update,
        head_bytes=0 if loop.inputs.config.stage == "reward_model" else head_bytes(parts, memory, largest),
        num_rows=len(rows),
        moments=all_moments(parts, loop.inputs.config),
        beside_weights=beside_weights(parts),
    )


def largest_steps(loop: OfflineLoop[Any, Any]) -> list[tuple[Sequence[Any], list[int]]]:
    """Rows of those of the run's steps that have the most tokens, and packed tokens of each step's microbatches.

    The order of the rows follows from the seed.
    """
    config = loop.inputs.config
    stream = PromptStream(loop.rows(), seed=config.seed, shuffle=config.data.shuffle)
    steps = [stream.next(loop.rows_per_step() or 1) for _ in range(config.training.num_steps or 1)]
    steps.sort(key=lambda rows: sum(map(loop.row_tokens, rows)), reverse=True)
    return [(rows, loop.microbatch_sizes(rows)) for rows in steps[:_CANDIDATES]]


def _subsets(loop: OfflineLoop[Any, Any], rows: Sequence[Any], largest: int) -> list[Sequence[Any]]:
    """Of the step's rows, shortest first: as many as fill a share of its largest microbatch, one by size."""
    by_length = sorted(rows, key=loop.row_tokens)
    subsets: dict[int, Sequence[Any]] = {}
    for share in SHARES:
        tokens = count = 0
        while count < len(by_length) and (not count or tokens + loop.row_tokens(by_length[count]) <= share * largest):
            tokens += loop.row_tokens(by_length[count])
            count += 1
        subsets[tokens] = by_length[:count]
    if len(subsets) < 2:  # the shortest row alone is above both shares
        subsets[loop.row_tokens(by_length[-1])] = by_length[-1:]
    return [subsets[size] for size in sorted(subsets)]


def _probe(loop: OfflineLoop[Any, Any], memory: DeviceMemory, rows: Sequence[Any]) -> Probe:
    memory.settle()
    start = time.monotonic()
    with watch(memory) as peak:
        sizes = loop.work_on(rows)
    seconds = (time.monotonic() - start) / len(sizes)
    return Probe(size=max(sizes), seconds=seconds, peak_bytes=peak.num_bytes)
