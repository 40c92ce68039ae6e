"""`python -m rlbench sandbox doctor`: what isolates model-written code on this machine, shown by trying."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlbench.commands.command_line import CommandLine
from rlbench_rewards.sandbox.backends import ISOLATED
from rlbench_rewards.sandbox.choice import format_reports
from rlbench_rewards.sandbox.probes import PROBES, probe_backend

USAGE = "python -m rlbench sandbox doctor"


def command_line() -> CommandLine:
    return CommandLine("sandbox doctor", USAGE, settings="")


def sandbox(arguments: Sequence[str]) -> int:
    """Exit status: 0 if a backend passes its required probes, 3 if none does, 2 for a wrong call."""
    if list(arguments) != ["doctor"]:
        print(f"usage: {USAGE}", file=sys.stderr)
        return 2
    reports = [probe_backend(kind) for kind in ISOLATED]
    print(format_reports(reports))
    print()
    for probe in PROBES:
        print(f"  {probe.name:14} {probe.what}{'' if probe.is_required else ' (not required)'}")
    print()
    good = [report for report in reports if report.is_good]
    if not good:
        print("verdict: nothing isolates here; the reward CodeTests refuses to start")
        return 3
    print(f"verdict: {good[0].kind} will be used (probed in {good[0].seconds:.1f} s)")
    return 0
