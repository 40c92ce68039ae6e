"""`python -m rlbench doctor`: what is usable on this machine, and the one step that fixes what is not."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rlbench.commands.command_line import CommandLine
from rlbench.commands.doctor_probes import Finding, findings
from rlbench.commands.machine import EXPERIMENT, Machine

USAGE = "python -m rlbench doctor [--json]"
_COMMAND = f"python -m rlbench +exp={EXPERIMENT}"


def command_line() -> CommandLine:
    line = CommandLine("doctor", USAGE, settings="")
    line.add_argument("--json", action="store_true", help="for scripts")
    return line


def doctor(arguments: Sequence[str], machine: Machine | None = None) -> int:
    """Exit status: 0 if the experiment grpo_gsm8k could run here, 1 if not, 2 for a wrong call."""
    if list(arguments) not in ([], ["--json"]):
        print(f"usage: {USAGE}", file=sys.stderr)
        return 2
    machine = machine or Machine()
    found = list(findings(machine))
    reasons = [_reason(finding) for finding in found if finding.is_needed and not finding.is_usable]
    if arguments:
        rows = [asdict(finding) for finding in found]
        print(json.dumps({"is_ready": not reasons, "reasons": reasons, "findings": rows}, indent=1))
    else:
        print("\n".join([*_verdict(reasons, machine), "", *_table(found)]))
    return 1 if reasons else 0


def _reason(finding: Finding) -> str:
    return f"{finding.what}: {finding.found}; to fix it: {finding.fix}"


def _verdict(reasons: Sequence[str], machine: Machine) -> list[str]:
    if not reasons:
        config = machine.config  # it could be derived, else there were a reason
        parts = f"{config.hardware.profile} profile, {config.model.path}, {config.model.dtype}, {config.engine.kind}"
        return [f"ready: {_COMMAND} can run here ({parts})"]
    return [f"not ready: {_COMMAND} cannot run here", *(f"  {reason}" for reason in reasons)]


def _table(found: Sequence[Finding]) -> list[str]:
    width = max(len(finding.what) for finding in found)
    lines = [f"{'what':{width}}  usable  found"]
    for finding in found:
        lines.append(f"{finding.what:{width}}  {'yes' if finding.is_usable else 'no':6}  {finding.found}")
        if finding.fix:
            need = "" if finding.is_needed else " (not needed to run)"
            lines.append(f"{'':{width}}          fix{need}: {finding.fix}")
    return lines
