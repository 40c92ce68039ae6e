"""The coefficient of the entropy bonus, held or steered towards a target entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class EntropyControl:
    """Coefficient of the entropy bonus, and the state of its control; saved in checkpoints.

    With a target the coefficient rises by `delta` after an update whose entropy was at most the target and falls by
    it otherwise, within [low, high]; it is applied only while the last entropy was at most the target, and not before
    the first measurement. Without a target it stays.

    Example:
        control = EntropyControl(coef=0.0, target=0.2, delta=0.005, low=0.0, high=1.0)
        control.observe(0.1)   # control.applied == 0.005

    Source: Skywork-OR1, arXiv:2505.22312; the order of measuring and applying as in TRL 1.16.
    """

    coef: float
    target: float | None = None
    delta: float = 0.0
    low: float = 0.0
    high: float = math.inf
    last_entropy: float | None = None  # nats a token

    @property
    def applied(self) -> float:
        """The coefficient of the next update."""
        if self.target is None:
            return self.coef
        return self.coef if self.last_entropy is not None and self.last_entropy <= self.target else 0.0

    def observe(self, entropy: float) -> None:
        """Take over the mean entropy that an update measured."""
        self.last_entropy = entropy
        if self.target is not None:
            step = self.delta if entropy <= self.target else -self.delta
            self.coef = min(self.high, max(self.low, self.coef + step))

    def state(self) -> dict[str, float | None]:
        return {"coef": self.coef, "last_entropy": self.last_entropy}

    def restore(self, state: dict[str, float | None]) -> None:
        """Continue after `state()`."""
        assert state["coef"] is not None
        self.coef, self.last_entropy = state["coef"], state["last_entropy"]
