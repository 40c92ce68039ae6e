"""One short name for a state of trained weights, the same on every device, taken where the tensors lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_DIGITS, _DIGITS_OF_BYTES = 20, 16


def fingerprint_of(tensors: Mapping[str, Tensor], more: str = "") -> str:
    """First 20 hex digits of a SHA-256 over names, shapes, dtypes and a sum of each tensor's bytes, in sorted order.

    The sums (`placed_word_sums`) tell states apart as training, rounding and mistakes make them, not those that someone
    made to have equal sums. To bring the bytes themselves to the host would take a percent of each step on a GPU.

    Args:
        more: what else the state consists of.
    """
    from rlbench.models.word_sums import placed_word_sums

    names = sorted(tensors)
    sums = placed_word_sums([tensors[name] for name in names])
    digest = hashlib.sha256(more.encode())
    for name, value in zip(names, sums, strict=True):
        digest.update(f"{name}:{tuple(tensors[name].shape)}:{tensors[name].dtype}:{value};".encode())
    return digest.hexdigest()[:_DIGITS]


def is_of_bytes(fingerprint: str) -> bool:
    """Whether an older rlbench recorded it, which hashed the bytes: nothing computed here can equal it."""
    return len(fingerprint) == _DIGITS_OF_BYTES
