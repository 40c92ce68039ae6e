"""What is trained goes to the engine; both then carry the same version and fingerprint."""

from __future__ import annotations

from rlbench.engine.interface import Engine, engine_call
from rlbench.models.adapter import Adapter
from rlbench.models.weights import Weights


def sync(weights: Adapter | Weights, engine: Engine, policy_version: int) -> str:
    """Copy the weights into the engine and return their fingerprint, taken on the trainer's side before the copy.

    Raises:
        EngineDeadError: the engine could not take it.
    """
    fingerprint = weights.fingerprint()
    with engine_call(engine, "weight sync"):
        engine.sync(weights, policy_version)
    return fingerprint
