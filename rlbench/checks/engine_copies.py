"""The engine's weights against the trainer's, bit for bit: of an adapter and its base, or of all weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlbench.checks.weight_copies import BaseGuard, differing_layers, explain, signature
from rlbench.engine.interface import Engine
from rlbench.models.adapter import Adapter
from rlbench.models.policy import Policy
from rlbench.models.weights import Weights, is_same_memory

_REMEMBERED_VERSIONS = 4


class AdapterCopies:
    """Of a policy with an adapter; the base must stay as it was."""

    def __init__(self, engine: Engine, policy: Policy, base: torch.nn.Module) -> None:
        self._engine, self._policy = engine, policy
        self._guard = BaseGuard(engine.base_tensors(), {n: p.detach() for n, p in base.named_parameters()})
        self._signatures: dict[int, list[int]] = {}  # of the engine's adapter, by the version that was synced

    def record_sync(self, version: int) -> None:
        """Remember what the engine holds after a sync, to name an older version later."""
        self._signatures[version] = _adapter_signature(self._engine.held_adapter())
        self._signatures = dict(sorted(self._signatures.items())[-_REMEMBERED_VERSIONS:])

    def problem(self, policy_version: int) -> str:
        """What differs, in words; empty if nothing does."""
        held, trained = self._engine.held_adapter(), self._policy.adapter()
        if layers := differing_layers(held, trained):
            found = self._older_version(held, policy_version) or explain(held, trained, layers)
            return f"the adapter in the engine is not the trainer's: {found}"
        if changed := self._guard.changed():
            side, name = changed[0].split(" ", 1)
            owner = {"engine": "the engine's base", "trainer": "the trainer's base", "shared": "the shared base"}[side]
            return f"{owner} changed since the run started, in {len(changed)} weights, the first is {name}"
        return ""

    def _older_version(self, held: Adapter, policy_version: int) -> str:
        found = _adapter_signature(held)
        for version, known in self._signatures.items():
            if known == found and version != policy_version:
                return f"the engine holds the adapter of policy version {version}"
        return ""


class FullCopies:
    """Of a policy that trains all weights; what an engine keeps as no tensor (vLLM on a CPU) is left to logprobs."""

    def __init__(self, engine: Engine, policy: Policy) -> None:
        self._engine, self._policy = engine, policy
        self._fingerprints: dict[int, str] = {}  # of what the engine held, by the version that was synced

    def record_sync(self, version: int) -> None:
        """Remember what the engine holds after a sync."""
        self._fingerprints[version] = Weights(tensors=self._engine.held_weights()).fingerprint()
        self._fingerprints = dict(sorted(self._fingerprints.items())[-_REMEMBERED_VERSIONS:])

    def problem(self, policy_version: int) -> str:
        """What differs, in words; empty if nothing does."""
        held, trained = self._engine.held_weights(), self._policy.weights()
        assert isinstance(trained, Weights)
        found = Weights(tensors=held).fingerprint()
        wrong = [n for n in sorted(held) if not is_same_memory(held[n], trained, n) and _differs(held[n], trained, n)]
        if wrong:
            older = [v for v, known in self._fingerprints.items() if known == found and v != policy_version]
            what = f"it holds those of policy version {older[-1]}" if older else "it holds other values"
            return (
                f"the weights in the engine are not the trainer's: {what} in {len(wrong)} of {len(held)} tensors, the "
                f"first is {wrong[0]}"
            )
        if self._fingerprints.get(policy_version, found) != found:
            return "the weights changed after the sync, on both sides: something else wrote into shared memory"
        return ""


def _differs(held: Tensor, trained: Weights, name: str) -> bool:
    return not torch.equal(held, trained.tensors[name].to(held))


def _adapter_signature(adapter: Adapter) -> list[int]:
    tensors: Mapping[str, Tensor] = {f"{n} a": t for n, t in adapter.lora_a.items()} | {
        f"{n} b": t for n, t in adapter.lora_b.items()
    }
    return signature(tensors)
