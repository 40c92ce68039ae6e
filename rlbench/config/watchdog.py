"""Every setting of the watchdog, which ends a run that hangs."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlbench.config.checks import check_range, nearest

PHASES = (
    "generation",
    "identity",
    "rewards",
    "reference",
    "teacher",
    "values",
    "critic_update",
    "update",
    "weight_sync",
    "recording",
    "checkpoint",
    "evaluation",
)


@dataclass
class WatchdogConfig:
    # Without a token, a reward, a microbatch or the end of a phase; 0: off. Longer than anything that is slow but
    # alive: one microbatch of a 7B model on two cores takes about 20 minutes, compiling kernels a few.
    limit_s: float = 1800.0
    phase_limits_s: dict[str, float] = field(default_factory=dict)  # +watchdog.phase_limits_s.generation=120; 0: off
    grace_s: float = 60.0  # in which the run may still save, report and close; then the process is ended from outside

    def __post_init__(self) -> None:
        check_range("watchdog.limit_s", self.limit_s, low=0)
        check_range("watchdog.grace_s", self.grace_s, low=0, is_low_open=True)
        for phase, limit_s in self.phase_limits_s.items():
            if phase not in PHASES:
                raise ValueError(
                    f"watchdog.phase_limits_s names {phase!r}, expected phases: "
                    f"{', '.join(nearest(phase, PHASES) or PHASES)}"
                )
            check_range(f"watchdog.phase_limits_s.{phase}", limit_s, low=0)

    def limit_of(self, phase: str | None) -> float:
        """Seconds without progress that `phase` (None: between two phases) may take; 0: any number."""
        return self.phase_limits_s.get((phase or "").replace(" ", "_"), self.limit_s)
