"""An engine's own copy of the policy's adapter, and the dense copies of its layers with that adapter merged into them.

Nothing here imports vllm.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlbench.engine.dense_copies import DenseCopies
from rlbench_kernels import ScaledCopies

_BASE = ""  # in place of a fingerprint


class MergedAdapter:
    """What `DenseCopies` hold: the base, or the base with the adapter that was loaded last.

    Example:
        merged = MergedAdapter(copies)
        merged.load(lora_a, lora_b, scaling, fingerprint)
        merged.use(with_adapter=True)  # fills the copies, unless they hold that already
        assert merged.num_differing() == 0
    """

    def __init__(self, copies: DenseCopies) -> None:
        self.copies = copies
        self._adapter: dict[str, tuple[Tensor, Tensor]] = {}  # A, and B with its scaling, in the copies' dtype
        self._scaling = 1.0  # of B
        self._load = ScaledCopies([], [])  # into all A of `_adapter`, then all B
        self._fingerprint = _BASE  # of `_adapter`
        self._content: str | None = None  # fingerprint of what is in the copies; None: not known
        self._with_adapter = False

    def load(
        self, lora_a: Mapping[str, Tensor], lora_b: Mapping[str, Tensor], scaling: float, fingerprint: str
    ) -> None:
        """Copy float32 A [R, in] and B [out, R] of each path; what the dense copies hold stays until `use`.

        The scaling is folded into B in float32, before the cast, as the trainer does.

        Args:
            lora_a: by path in the checkpoint.
            lora_b: of the same paths.
            scaling: of B.
            fingerprint: hexadecimal, of this adapter; it seeds the rounding.
        """
        self._fingerprint = _BASE
        has_shapes = {n: t.shape for n, t in lora_a.items()} == {n: a.shape for n, (a, _) in self._adapter.items()}
        if not has_shapes or scaling != self._scaling:
            self._adapter = {name: (self._empty(a), self._empty(lora_b[name])) for name, a in lora_a.items()}
            self._scaling = scaling
            targets = [a for a, _ in self._adapter.values()] + [b for _, b in self._adapter.values()]
            self._load = ScaledCopies(targets, [1.0] * len(lora_a) + [scaling] * len(lora_a))
        self._load([lora_a[name] for name in self._adapter] + [lora_b[name] for name in self._adapter])
        self._fingerprint = fingerprint

    def held(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Live A [R, in] and scaled B [out, R] by path."""
        return {n: a for n, (a, _) in self._adapter.items()}, {n: b for n, (_, b) in self._adapter.items()}

    def forget(self) -> None:
        """The memory of the copies was given back."""
        self._content = None

    def use(self, *, with_adapter: bool) -> None:
        """Let the copies hold the base alone, or with the adapter."""
        self._with_adapter = with_adapter
        wanted = self._fingerprint if with_adapter else _BASE
        if self._content != wanted:
            self._content = None
            self.copies.fill(*self._arguments())
            self._content = wanted

    def num_differing(self) -> int:
        """How many matrices are not what they should be since `use`: written again elsewhere and compared."""
        return self.copies.num_differing(*self._arguments())

    def _arguments(self) -> tuple[Mapping[str, tuple[Tensor, Tensor]] | None, int]:
        return (self._adapter, int(self._fingerprint[:8] or "0", 16)) if self._with_adapter else (None, 0)

    def _empty(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=self.copies.dtype, device=self.copies.device)


class MergedAdapterCalls:
    """Mixed into vLLM's worker. Every name starts with `rlbench_`, so that none can meet one of vLLM's own."""

    rlbench_merged: MergedAdapter

    def rlbench_merged_shapes(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of every linear layer that can be adapted, by its path in the checkpoint."""
        return self.rlbench_merged.copies.shapes

    def rlbench_load_merged(
        self, lora_a: Mapping[str, Tensor], lora_b: Mapping[str, Tensor], scaling: float, fingerprint: str
    ) -> None:
        """See `MergedAdapter.load`. Shapes were checked before."""
        self.rlbench_merged.load(lora_a, lora_b, scaling, fingerprint)

    def rlbench_held_merged(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `MergedAdapter.held`."""
        return self.rlbench_merged.held()

    def rlbench_use_merged(self, with_adapter: bool) -> None:
        """See `MergedAdapter.use`."""
        self.rlbench_merged.use(with_adapter=with_adapter)

    def rlbench_num_differing(self) -> int:
        """See `MergedAdapter.num_differing`."""
        return self.rlbench_merged.num_differing()
