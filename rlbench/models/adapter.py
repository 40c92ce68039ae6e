"""LoRA weights as a record: what the trainer hands to an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlbench.models.fingerprint import fingerprint_of

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
        """See `fingerprint_of`; the scaling is part of it."""
        named = {f"a:{name}": tensor for name, tensor in self.lora_a.items()}
        return fingerprint_of(named | {f"b:{name}": tensor for name, tensor in self.lora_b.items()}, repr(self.scaling))


def check_adapter(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Whether an adapter fits a base.

    Args:
        adapter: to be loaded.
        shapes: (out_features, in_features) of every layer that can have an adapter, by module path.

    Raises:
        ValueError: if A or B is missing, a module is unknown, or a shape does not fit.
    """
    if set(adapter.lora_a) != set(adapter.lora_b):
        raise ValueError(f"adapter has A or B alone for {sorted(set(adapter.lora_a) ^ set(adapter.lora_b))}")
    unknown = sorted(set(adapter.lora_a) - set(shapes))
    if unknown:
        raise ValueError(f"adapter names {unknown[0]!r} and {len(unknown) - 1} more modules unknown to the base")
    for name, lora_a in adapter.lora_a.items():
        lora_b, (num_out, num_in), rank = adapter.lora_b[name], shapes[name], lora_a.shape[0]
        expected = [(rank, num_in), (num_out, rank)]
        if [tuple(lora_a.shape), tuple(lora_b.shape)] != expected:
            got = [tuple(lora_a.shape), tuple(lora_b.shape)]
            raise ValueError(f"adapter of {name}: A and B have shapes {got}, expected {expected}")
