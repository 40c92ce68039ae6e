"""Runs killed with signal 9 again and again and resumed each time, against the same runs left alone, bit for bit.

    python scripts/soak_kills.py [--kinds grpo,sft] [--kills 2] [--steps 12] [--seed 0] [--parallel 2] [--out FILE]

Each kind is killed at the moments of `PLANNED`, at --kills random ones (half by the clock, half before a random
operation on a file), and at those of `AT_THE_END`; always the same command goes on, `resume=auto`. Everything that a
run leaves must be identical: weights, optimizer, state, every line of the metrics (without times), rollouts,
evaluations, the report's numbers, the chain's record; no file may be missing or left over. Tiny models with random
weights, on a CPU; each run is a fork of a process with torch imported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.kill_kinds import KINDS, make_data, overrides_of  # noqa: E402
from scripts.left_by_runs import differences  # noqa: E402
from tests.loops.conftest import SERVER  # noqa: E402
from tests.loops.self_kill import program  # noqa: E402

LIMIT_S = 300.0  # of one process
ALL, DIFFER = "all", "files that differ"  # a case and a metric of the result
LOCKS = {kind: threading.Lock() for kind in KINDS}  # of the runs that are left alone, some of which others start from
PLANNED = {
    "in the first update": "update 1 .",
    "in the first checkpoint, before its manifest": "before 1 open .*/checkpoints/.step.*manifest",
    "in the first checkpoint, before its name": "before 1 os.rename .*/checkpoints/",
    "in a line of the metrics": "line 5 .",
    "in the resume, before the metrics are cut": "before 1 os.rename .*metrics.jsonl",
    "in the resume, with half a config": "empty 1 open .*/[.]?config.yaml",
    "twice in a step, before the update": "update 1 .",
    "twice in a step, after the update": "updated 1 .",
    "before the name of a rollouts file": "before 1 os.rename .*/rollouts/",
    "before an old checkpoint goes": "before 1 os.rename .*/checkpoints/step",
    "while an old checkpoint goes": "before 1 os.remove (state.json|optimizer.safetensors)",
    "stopped in a step with an evaluation": "stop 3 .",
    "after the evaluation that the stop put off": "update 1 .",
}
IN_THE_SECOND_STAGE = {  # of a chain
    "before the chain's record of a stage": "before 2 os.rename .*chain.json",
    "before the name of a rollouts file": "before 1 os.rename .*/rollouts/",
    "in the second stage's first update": "update 1 .",
    "in the second stage's first checkpoint": "before 1 os.rename .*2_grpo/checkpoints/",
    "in a line of the second stage": "line 5 .",
    "in the resume of the second stage": "before 1 os.rename .*2_grpo/[.]?metrics.jsonl",
    "twice in a step of the second stage": "updated 1 .",
}
AT_THE_END = {
    "before the last checkpoint": "before 1 open .*/checkpoints/.step-{steps:06d}",
    "before the last checkpoint's name": "before 1 os.rename .*/checkpoints/.step-{steps:06d}",
    "in the result": "before 1 open run/(2_grpo/)?.result.tmp/(adapter|model)/",
    "before the result's name": "before 1 os.rename .*/.result.tmp/",
    "in the report": "before 1 os.rename .*report.html",
    "in the last checkpoint written again": "before 2 os.rename .*/checkpoints/",
    "before the chain's last record": "before 2 os.rename .*chain.json",
}


@dataclass(slots=True, kw_only=True)
class Outcome:
    kind: str
    steps: int
    kills: int = 0
    stops: int = 0
    processes: int = 0
    not_reached: list[str] = field(default_factory=list)  # moments that the run did not come to
    differing: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Failed(Exception):
    """A run that was to go on ended."""


def main() -> None:
    options = parse()
    place = options.folder or Path(tempfile.mkdtemp(prefix="rlbench-kills-"))
    place.mkdir(parents=True, exist_ok=True)
    print(f"runs and logs: {place}", flush=True)
    outcomes, alone = [], {}
    try:
        make_data(place)
        SERVER.start([], place, program="pass").wait(LIMIT_S)  # so that the threads find it there
        with ThreadPoolExecutor(options.parallel) as pool:
            for outcome in pool.map(lambda kind: soak(kind, place, options, alone), options.kinds):
                outcomes.append(outcome)
                print(line_of(outcome), flush=True)
                if options.out:
                    options.out.write_text(json.dumps(result_of(outcomes, options), indent=1) + "\n")
    finally:
        SERVER.close()
    is_good = not any(outcome.differing for outcome in outcomes)
    if is_good and options.folder is None:
        shutil.rmtree(place)
    sys.exit(not is_good)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: %(default)s")
    parser.add_argument("--kills", type=int, default=2, help="random ones, of each kind")
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=2, help="kinds at a time")
    parser.add_argument("--folder", type=Path, help="of runs and logs; default: a temporary one")
    parser.add_argument("--out", type=Path, help="the JSON; what it holds of other kinds stays")
    options = parser.parse_args()
    options.kinds = options.kinds.split(",")
    if not set(options.kinds) <= set(KINDS):
        parser.error(f"--kinds is {','.join(options.kinds)}, expected some of {','.join(KINDS)}")
    return options


def soak(kind: str, place: Path, options: argparse.Namespace, alone: dict[str, Path]) -> Outcome:
    """One kind: the run that is left alone, the one that is killed, and what differs between them."""
    outcome, began = Outcome(kind=kind, steps=options.steps), time.monotonic()
    try:
        seconds, num_operations = leave_alone(kind, place, options.steps, alone)
        run = place / kind / "killed" / "run"
        run.parent.mkdir(parents=True)
        arguments = [*overrides_of(kind, place, options.steps, alone), "hydra.run.dir=run", "resume=auto"]
        draw = random.Random(f"{options.seed} {kind}")
        for name, moment in moments(kind, options, draw, seconds, num_operations):
            note_end(outcome, name, run_until(moment, arguments, run.parent))
        outcome.processes += 1
        if run_until("", arguments, run.parent) != 0:
            raise Failed("the last resume ended badly")
        outcome.differing = differences(alone[kind], run)
    except Failed as failure:
        outcome.differing = [f"{failure}: {place / kind}"]
    outcome.seconds = round(time.monotonic() - began, 1)
    return outcome


def leave_alone(kind: str, place: Path, num_steps: int, alone: dict[str, Path]) -> tuple[float, int]:
    """Run `kind`, and first what it starts from, into `alone`; seconds and operations on files."""
    after = KINDS[kind].after
    if after:
        leave_alone(after, place, num_steps, alone)
    folder = place / kind / "alone"
    record = folder / "operations.txt"
    with LOCKS[kind]:
        began = time.monotonic()
        if kind in alone:
            return 2.0, len(record.read_text().splitlines())
        folder.mkdir(parents=True)
        arguments = [*overrides_of(kind, place, num_steps, alone), "hydra.run.dir=run", "resume=auto"]
        if run_until("", arguments, folder, record) != 0:
            raise Failed("the run that is left alone ended badly")
        alone[kind] = folder / "run"
    return time.monotonic() - began, len(record.read_text().splitlines())


def moments(
    kind: str, options: argparse.Namespace, draw: random.Random, seconds: float, num_operations: int
) -> Iterator[tuple[str, str]]:
    """Names and moments; "clock SECONDS" is one too."""
    yield from ((name, moment) for name, moment in PLANNED.items() if has_moment(kind, moment))
    if KINDS[kind].data == "chain":
        yield from IN_THE_SECOND_STAGE.items()
    share = 1 / (options.kills + 1)  # of a whole run, the most that passes before each
    for number in range(options.kills):
        if number % 2:
            yield "random", f"before {draw.randint(1, max(1, int(num_operations * share)))} ."
        else:
            yield "random", f"clock {draw.uniform(0.3, max(0.6, seconds * share)):.2f}"
    for name, moment in AT_THE_END.items():
        if has_moment(kind, moment):
            yield name, moment.format(steps=options.steps)


def has_moment(kind: str, moment: str) -> bool:
    """Not every kind has rollouts in its first stage, or is a chain."""
    data = KINDS[kind].data
    return ("rollouts" not in moment or data == "prompts") and ("chain.json" not in moment or data == "chain")


def note_end(outcome: Outcome, name: str, status: int) -> None:
    outcome.processes += 1
    if status == -signal.SIGKILL:
        outcome.kills += 1
    elif status == 128 + signal.SIGTERM:
        outcome.stops += 1
    elif status == 0:
        outcome.not_reached.append(name)
    else:
        raise Failed(f"after {name!r}: status {status}")


def run_until(moment: str, arguments: list[str], folder: Path, record: Path | None = None) -> int:
    """Start or go on until the moment, or the end; returns the status, minus the signal's number if it was killed."""
    clock_s = float(moment.split()[1]) if moment.startswith("clock") else LIMIT_S
    own = "" if moment.startswith("clock") else moment
    process = SERVER.start(arguments, folder, program=program(own, record), are_merged=True)
    is_late = False
    try:
        output = process.communicate(timeout=clock_s)[0]
    except subprocess.TimeoutExpired:
        is_late, output = clock_s == LIMIT_S, ""
    status = process.wait(10)
    with (folder / "log.txt").open("a") as log:
        log.write(f"=== {moment or 'no kill'}: status {status}\n{output}\n")
    if is_late:
        raise Failed(f"no end in {LIMIT_S:g} s")
    return status


def line_of(outcome: Outcome) -> str:
    verdict = "identical" if not outcome.differing else "DIFFERS:\n  " + "\n  ".join(outcome.differing[:20])
    rest = f", not reached: {', '.join(outcome.not_reached)}" if outcome.not_reached else ""
    return f"{outcome.kind}: {outcome.kills} kills, {outcome.stops} stops, {outcome.seconds:.0f} s: {verdict}{rest}"


def result_of(outcomes: list[Outcome], options: argparse.Namespace) -> dict[str, Any]:
    """Rows of the kinds, after those of other kinds that the file holds already."""
    ran, rows = {outcome.kind for outcome in outcomes}, []
    if options.out.exists():
        before = json.loads(options.out.read_text())
        rows = [{"commit": before["commit"], **row} for row in before["rows"] if row["case"] not in {*ran, ALL}]
    rows += [row for outcome in outcomes for row in rows_of(outcome)]
    values = {metric: [row["value"] for row in rows if row["metric"] == metric] for metric in ("kills", DIFFER)}
    totals = {"kinds": len(values["kills"]), "kills": sum(values["kills"])}
    totals[DIFFER] = sum(len(value) for value in values[DIFFER] if value != "none")
    return {
        "command": f"python scripts/soak_kills.py --kills {options.kills} --steps {options.steps} --seed {options.seed}"
        " --out FILE",
        "device": f"{os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
        "commit": commit(),
        "rows": [row_of(ALL, metric, number) for metric, number in totals.items()] + rows,
    }


def rows_of(outcome: Outcome) -> list[dict[str, Any]]:
    found: dict[str, Any] = {"steps": outcome.steps, "kills": outcome.kills, "stops": outcome.stops}
    found[DIFFER] = outcome.differing or "none"
    return [{"commit": commit(), **row_of(outcome.kind, metric, value)} for metric, value in found.items()]


def row_of(kind: str, metric: str, number: object) -> dict[str, Any]:
    return {"case": kind, "impl": "rlbench", "metric": metric, "value": number, "unit": ""}


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
