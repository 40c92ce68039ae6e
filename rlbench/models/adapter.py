"""LoRA weights as a record: what the trainer hands to an engine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """LoRA weights on their way from the trainer to an engine.

    `lora_a[name]` is float32 [R, in_features] and `lora_b[name]` float32 [out_features, R]; `name` is the module path
    inside the base model, e.g. "model.layers.0.self_attn.q_proj". The update of a linear layer is
    `y += scaling * (x @ lora_a.T) @ lora_b.T`.
    """

    lora_a: Mapping[str, Tensor]
    lora_b: Mapping[str, Tensor]
    scaling: float

    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 over names, shapes, bytes and scaling, in sorted order."""
        digest = hashlib.sha256(repr(self.scaling).encode())
        for kind, tensors in (("a", self.lora_a), ("b", self.lora_b)):
            for name in sorted(tensors):
                tensor = tensors[name].detach().cpu().contiguous()
                digest.update(f"{kind}:{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]
