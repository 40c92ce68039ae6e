"""The trainer's adapter goes to the engine; both then carry the same version and fingerprint."""

from __future__ import annotations

from rlbench.engine.interface import Engine, engine_call
from rlbench.models.adapter import Adapter


def sync(adapter: Adapter, engine: Engine, policy_version: int) -> str:
    """Copy the adapter into the engine and return its fingerprint, taken on the trainer's side before the copy.

    Raises:
        EngineDeadError: the engine could not take it.
    """
    fingerprint = adapter.fingerprint()
    with engine_call(engine, "weight sync"):
        engine.sync(adapter, policy_version)
    return fingerprint
